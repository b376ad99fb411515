"""From prompts to ledger lines: what is missing is answered, by an engine, within memory.

Read `answering.py` first (one run), `prompt_store.py` and `batching.py` (which rows together), `ladder.py` (when memory
runs out), `stopping.py`, `likelihood.py` (scores of references), `streaming.py`; `engines/` computes, `runners/` says
where.
"""
