"""Where runs and models lie: a folder on this disk, or a URL with a mirror here.

In goes a folder or URL; out come local paths, and what was written is sent. Read `store.py` first, then `versions.py`
(small files that several machines change) and `lease.py` (who works on a run at a URL).
"""
