"""A judge model: a row goes in, a verdict comes out, paid for once.

Read `judge.py` first, then `prompts.py`, `replies.py`, `endpoint.py` and `local.py` (who answers), `judged.py` and
`judge_metrics.py`; `calibration.py`, `labels.py` and `agreement.py` say whether people agree with it.
"""
