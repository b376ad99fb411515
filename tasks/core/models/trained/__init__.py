"""The models that training made: their folder or URL, which is newest, which is promoted.

Read `registry.py` first (names, manifests, what is complete), `discovery.py` (which one a run uses), `history.py`,
`alias.py` and `champion.py` (which one is promoted); `alias_folder.py` and `alias_bucket.py` write the alias where it
is, `folders.py` and `model_store.py` bring models from a URL and send them there.
"""
