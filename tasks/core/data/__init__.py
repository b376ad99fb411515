"""From a dataset to examples: a Hub id, file or folder goes in, rows with a content id come out.

Read `sources.py` first (where rows come from), `local_files.py` and `formats/` (how files are read), `cells.py` and
`cell_texts.py` (what a value means), `choosing.py`, `columns.py` and `conversations.py` (from columns to examples);
`normalising.py`, `question_words.py` and `preflight.py` find test questions that training has seen.
"""
