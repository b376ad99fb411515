"""The metrics that settings may name. The room of metrics comes later and knows them; it is asked when it matters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import cast

from tasks.core.config.changes import ScoringModel

CATALOGUE = "tasks.core.metrics.catalogue"
"""Asked by its name, as a module of the user's own is, since settings stand below all that they are for."""
DEFAULT_METRICS = ("exact_match", "f1", "bleu_score", "chrf", "rouge_score")
_WITH_COLON = re.compile(r"[A-Za-z_][\w.]*:.+")


def known_metrics() -> Mapping[str, tuple[ScoringModel, ...]]:
    """The name of each metric, and the models that it asks."""
    return cast("Mapping[str, tuple[ScoringModel, ...]]", import_module(CATALOGUE).models_by_name())


def metric_names() -> list[str]:
    """Their names, in the order of the documentation."""
    return list(known_metrics())


def check_metric_name(name: str) -> str:
    """Raise ValueError for a name that is no metric's, nor of the form regex_match:PATTERN or module:function."""
    if name not in DEFAULT_METRICS and not _WITH_COLON.fullmatch(name) and name not in known_metrics():
        raise ValueError("is no metric")
    return name
