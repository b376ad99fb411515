"""A run's folder: rows and identity go in, ledger lines and the published file come out.

Read `run_dir.py` first (whose a folder is), `rows.py` and `kept_rows.py` (what is asked, read once), `ledger_lines.py`
and `ledger.py` (what was answered), `sessions.py` and `work_done.py` (the stretches of work), `published.py` and
`manifest.py` (the whole file, the manifest last), `sync.py` (the copy at a URL), `progress.py`.
"""
