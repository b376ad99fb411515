"""From a model's name to a loaded model with its identity.

In goes a `ModelSpec`; out comes a `LoadedModel`, or a `ModelIdentity` without weights in memory. Read `locating.py`
first (name -> files), `packaged.py`, `specs.py`, `checking.py` (what is refused before weights are read),
`identifying.py`, `tokenizing.py`, `loading.py`, `adapters.py`, `placement.py`; `trained/` holds the models that a
training made.
"""
