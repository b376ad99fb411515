"""The models that training made: their folder, which is newest, which is promoted.

Read `registry.py` first (names, manifests, what is complete), `discovery.py` (which one a run uses), `history.py`,
`alias.py` and `champion.py` (which one is promoted), `model_store.py` (models at a URL).
"""
