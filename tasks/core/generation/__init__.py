"""From prompts to ledger lines: what is missing is answered, by an engine, within memory.

A `RunPlan` (`plan.py`) says what is answered, `runners/` where; `answering_model.py` has the model. Read `answering.py`
next (one run), `prompt_store.py` and `batching.py` (which rows together), `ladder.py` (when memory runs out),
`stopping.py`, `finishing.py` (what follows the answers), `likelihood.py` and `reference_scorer.py` (scores of
references), `streaming.py`, `settings.py` (from the section to a plan); `engines/` computes.
"""
