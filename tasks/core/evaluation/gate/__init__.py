"""The gate: compared figures go in, promote, reject or inconclusive comes out, with every check.

Read `gate.py` first, then `inputs.py`, `gate_checks.py`, `evidence_checks.py`, `origin_checks.py`.
"""
