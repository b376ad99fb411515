"""The metrics by name: what a config may list, and what each name reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

from tasks.core.config.changes import ScoringModel
from tasks.core.errors import EvaluationError
from tasks.core.metrics.answer_metrics import ANSWER_FAMILIES, pattern_family
from tasks.core.metrics.behaviour_metrics import BEHAVIOUR_FAMILIES
from tasks.core.metrics.judge.judge_metrics import JUDGE_FAMILIES
from tasks.core.metrics.likelihood_metrics import LIKELIHOOD_FAMILIES
from tasks.core.metrics.metric import Metric, MetricFamily, ScoredRun
from tasks.core.metrics.overlap_metrics import OVERLAP_FAMILIES
from tasks.core.metrics.similarity_metrics import SIMILARITY_FAMILIES
from tasks.core.metrics.user_metrics import unread_family, user_family

FAMILIES: tuple[MetricFamily, ...] = (
    *OVERLAP_FAMILIES,
    *ANSWER_FAMILIES,
    *BEHAVIOUR_FAMILIES,
    *LIKELIHOOD_FAMILIES,
    *SIMILARITY_FAMILIES,
    *JUDGE_FAMILIES,
)
"""All that can be named, in the order of the documentation. What is known of each stands in its own file."""


def available() -> tuple[MetricFamily, ...]:
    """All families that can be named."""
    return FAMILIES


def models_by_name() -> dict[str, tuple[ScoringModel, ...]]:
    """Each family's name, and the models that it asks; the settings' room knows metrics by this."""
    return {family.name: family.models for family in available()}


def family_of(name: str) -> MetricFamily | None:
    return next((family for family in available() if family.name == name), None)


def known_metric(name: str) -> Metric | None:
    """The metric of that name; None for one of the user's own, and for one that was there in earlier versions."""
    return next((metric for metric in reported(available()) if metric.name == name), None)


def resolve(
    names: Iterable[str], run: ScoredRun | None = None, *, runs_code: bool = True
) -> tuple[MetricFamily, ...]:
    """Families for the names of a config, each once, in their order.

    Besides those of `FAMILIES`: `regex_match:PATTERN`, and `module:function` for a metric of one's own.
    Metrics that need a model or a file of the run score only when `run` is given. Without `runs_code` the module of
    one's own metric is not imported, and what it says of its range is not known.
    Raises EvaluationError for a name that does not exist, with the nearest ones.
    """
    families = {name: _bound(_family(name, runs_code=runs_code), run) for name in names}
    if not families:
        raise EvaluationError("no metric is named", f"name at least one of: {', '.join(models_by_name())}")
    return tuple(families.values())


def prompt_sha256(metric: str) -> str:
    """Digest of what a judge is asked for a metric, whatever the row; another one is another way to judge.

    Raises KeyError for a metric that no judge scores.
    """
    family = family_of(metric)
    if family is None or family.judged is None:
        raise KeyError(metric)
    return family.judged.asks().digest(metric)


def reported(families: Iterable[MetricFamily]) -> tuple[Metric, ...]:
    """All metrics that the families report, each once."""
    return tuple({metric.name: metric for family in families for metric in family.metrics}.values())


def _bound(family: MetricFamily, run: ScoredRun | None) -> MetricFamily:
    return family if family.bind is None or run is None else replace(family, score=family.bind(run))


def _family(name: str, *, runs_code: bool) -> MetricFamily:
    if (known := family_of(name)) is not None:
        return known
    before, colon, after = name.partition(":")
    if colon and before == "regex_match":
        return pattern_family(after)
    if colon and before and after:
        return user_family(name) if runs_code else unread_family(name)
    names = models_by_name()
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise EvaluationError(
        f"unknown metric {name!r}",
        f"{hint}available: {', '.join(names)}, and module:function for your own",
    )
