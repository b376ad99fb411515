"""What a training learns from: examples go in, rows, batches and a loss come out.

Read `rows.py` first, then `packing.py`, `batches.py`, `answer_loss.py`.
"""
