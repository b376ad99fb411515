"""What a training learns from: settings and a tokenizer go in, rows, batches and a loss come out.

Read `base.py` first (what a method is), `catalogue.py` (which there are), `sft.py` (the answers of the rows), then what
methods are made of: `rows.py`, `packing.py`, `batches.py`, `answer_loss.py`.
"""
