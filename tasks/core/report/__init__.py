"""An evaluation for people: files of an evaluation go in, pages and a spreadsheet come out.

Read `writing.py` first, then `report.py`, `row_view.py`, `spreadsheet.py`; `leaderboard.py`,
`lineage.py`, `calibration_page.py` and `plots.py` stand apart. Pages are made by `html_page.py`.
"""
