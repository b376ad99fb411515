"""Names that settings may have and later rooms know: metrics, training methods, engines.

A catalogue is asked by its name, as a module of the user's own is, since settings stand below all that they are for;
and only when a setting is not the usual one, so that usual settings load nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from tasks.core.config.changes import ScoringModel

METRICS = "tasks.core.metrics.catalogue"
METHODS = "tasks.core.training.methods.catalogue"
ENGINES = "tasks.core.generation.engines.catalogue"

DEFAULT_METRICS = ("exact_match", "f1", "bleu_score", "chrf", "rouge_score")
DEFAULT_METHOD = "sft"
DEFAULT_ENGINE = "auto"
_METRIC_WITH_COLON = re.compile(r"[A-Za-z_][\w.]*:.+")
_OWN_ENGINE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def known_metrics() -> Mapping[str, tuple[ScoringModel, ...]]:
    """The name of each metric, and the models that it asks."""
    return cast("Mapping[str, tuple[ScoringModel, ...]]", import_module(METRICS).models_by_name())


def metric_names() -> list[str]:
    """The metrics, in the order of the documentation."""
    return list(known_metrics())


def check_metric_name(name: str) -> str:
    """Raise ValueError for a name that is no metric's, nor of the form regex_match:PATTERN or module:function."""
    if name not in DEFAULT_METRICS and not _METRIC_WITH_COLON.fullmatch(name) and name not in known_metrics():
        raise ValueError("is no metric")
    return name


def method_names() -> list[str]:
    """The training methods."""
    return [method.name for method in import_module(METHODS).METHODS]


def check_method_name(name: str) -> str:
    """Raise ValueError for a name that is no training method's."""
    if name != DEFAULT_METHOD and name not in method_names():
        raise ValueError("is no training method")
    return name


def engine_names() -> list[str]:
    """The engines, and the choice among them."""
    return [DEFAULT_ENGINE, *_engines().ENGINES]


def check_engine_name(name: str) -> str:
    """Raise ValueError for a name that is no engine's, nor of the form module:Class."""
    if name == DEFAULT_ENGINE or _OWN_ENGINE.fullmatch(name) or name in _engines().ENGINES:
        return name
    raise ValueError(_engines().REMOVED.get(name, "is no engine"))


def _engines() -> Any:
    return import_module(ENGINES)
