"""Promotion: a model and its evidence go in, the alias and its history move.

Read `promotion.py` first, then `promotable.py` (what an evaluation says for it) and `card.py`.
"""
