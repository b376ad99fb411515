"""Prompts: how a model is asked, and how what it says is read.

In go a tokenizer with its chat template, and the texts that a model wrote; out come the markers between which
the model thinks, and each text's answer apart from its thoughts. Read `thoughts.py` first (markers and split),
then `thought_markers.py` (how the markers of a model are found).
"""
