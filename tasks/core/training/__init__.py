"""From training rows to a complete model folder.

In go settings and a base model; out comes a `ModelManifest`. Read `run.py` first (the whole way), `job.py`,
`session.py` (one try), `trainer.py`, `checkpoints.py`, `fitting.py` (when memory runs out), `identity.py`,
`weights.py`; `methods/` has a file for each way to learn from rows.
"""
