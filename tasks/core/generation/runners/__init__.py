"""Where a plan is answered: a `RunPlan` goes in, the ledger's index comes out (`Runner.answer`).

`choosing.py` decides; `here.py` is this process, `child.py` one that may die (`isolation.py`,
`deaths.py`), `processes.py` several. `shards.py` is what all ways in shards share, `seats.py` who gets which device and
cores, `pool.py` what a process of somebody else's pool does first.
"""
