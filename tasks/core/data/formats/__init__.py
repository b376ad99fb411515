"""One file a format: bytes go in, rows come out, each value as it is written; `limits.py` says how much is read."""
