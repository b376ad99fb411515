"""The gate: compared figures go in, promote, reject or inconclusive comes out, with every check.

Read `gate.py` first, then `case.py` (what a check gets and gives), `checks.py` (all of them in one tuple) and the
checks: `metric_checks.py`, `evidence_checks.py`, `origin_checks.py`.
"""
