"""What answers are scored by: answer and reference go in, a value comes out. No model, no file, no Prefect.

Reading order: `numbers` (the result of an answer as an exact value), `normalising` (what two texts must share to be the
same answer), `gsm8k` (the two filters of lm-evaluation-harness).
"""
