"""One file a format: the path of a file goes in, rows come out, each value as it is written.

Read `format.py` first (what a format is) and `catalogue.py` (all of them); then one file a format: `json_files.py` with
`json_texts.py`, `csv_files.py`, `parquet_files.py`, `arrow_files.py`. `texts.py` opens text, `tables.py` makes one of
typed files that differ, `limits.py` says how much is read.
"""
