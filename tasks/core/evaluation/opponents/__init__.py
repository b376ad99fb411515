"""Which runs a candidate is compared with: a name or none goes in, run folders come out, brought here from a URL.

`run_lookup.py` finds runs and the models that still have to answer, `champions.py` the champions before,
`remote_runs.py` brings and sends.
"""
