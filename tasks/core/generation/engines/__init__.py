"""Engines: requests from a queue go in, rows come out as they finish.

Read `base.py` first (what an engine is), `catalogue.py` (which there are), `choosing.py`, `sorted_batches.py`
(transformers' generate), then the in-flight engine: `inflight.py`, `step.py`, `packed_attention.py`, `slots.py`,
`lanes.py`, `fused_layers.py`; `sampling.py` and `faults.py` choose tokens for all of them.
"""
