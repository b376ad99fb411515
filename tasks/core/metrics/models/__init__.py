"""Models that score answers: texts go in, vectors or similarities come out; `scoring_models.py` makes each."""
