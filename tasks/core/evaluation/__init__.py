"""From answers to a verdict: a run goes in, figures with intervals and a decision come out.

Read `evaluate.py` first (the whole way), `scoring.py`, `pairs.py` and `run_scoring.py` (scores), `statistics.py`,
`figures.py` and `comparison.py` (what they show), `contamination.py`, `noise.py`, `nights.py` and `outlook.py` (what
may fool it), `summary.py` and `outputs.py` (what is written); `opponents/` finds the runs to compare, `gate/` decides.
"""
