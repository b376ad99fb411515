"""What answers are scored by: rows go in, a value a row and a figure for all of them come out.

Read `metric.py` first (what a metric is), `catalogue.py` (all by name), then one file a family: `overlap_metrics.py`
with `ngrams.py`, `answer_metrics.py` with `numbers.py` and `gsm8k.py`, `behaviour_metrics.py`, `likelihood_metrics.py`,
`similarity_metrics.py`, `user_metrics.py`; `judge/` and `models/` for metrics that ask a model.
"""
