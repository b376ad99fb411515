"""The checks of the gate, one function each, in the order in which they are told; and what is told besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError
from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.gate import evidence_checks as evidence
from tasks.core.evaluation.gate import metric_checks as metrics
from tasks.core.evaluation.gate import origin_checks as origin
from tasks.core.evaluation.gate.case import Case, Finding, Found, GateInputs, Tested
from tasks.core.evaluation.summary import MetricComparison
from tasks.core.evaluation.wording import is_share, label
from tasks.core.metrics.metric import Metric

if TYPE_CHECKING:
    from tasks.core.config import GateConfig

CHECKS: tuple[Callable[[Case], Found], ...] = (
    metrics.primary_metric,
    metrics.guards,
    metrics.watched_rates,
    evidence.error_rows,
    evidence.same_rows,
    evidence.enough_rows,
    evidence.enough_scored,
    evidence.worthwhile_gain,
    evidence.above_noise,
    origin.judge_agrees,
    origin.champion_compared,
    origin.same_settings,
    origin.same_reference_scores,
    origin.same_template,
    origin.new_questions,
)
_MUCH_LONGER, _SHORT_CHARACTERS = 2.5, 40


def case_of(inputs: GateInputs, primary: Metric, settings: GateConfig) -> Case:
    """What the checks get. Raises EvaluationError where the primary metric was not computed for both runs."""
    compared = inputs.comparison.metric(primary.name)
    if compared is None:
        raise EvaluationError(f"the metric {primary.name} was not computed for both runs", "evaluate again")
    return Case(inputs, settings, compared, tuple(_guards(inputs, compared, settings)))


def _guards(
    inputs: GateInputs, primary: MetricComparison, settings: GateConfig
) -> Iterator[MetricComparison]:
    for compared in inputs.comparison.metrics:
        if compared.name == primary.name or compared.direction == "none":
            continue
        metric = inputs.candidate.metric(compared.name)
        between_0_and_1 = metric is not None and is_share(metric.minimum, metric.maximum)
        wanted = settings.guard_metrics
        if compared.name in wanted if wanted != "others" else between_0_and_1:
            yield compared


def findings(case: Case) -> list[Finding]:
    """What all checks find, the weightiest first; p values are adjusted for their number (Holm)."""
    found = [one for looks in CHECKS for one in looks(case)]
    adjusted = iter(stats.holm([one.p_value for one in found if isinstance(one, Tested)]))
    return [one.told(next(adjusted)) if isinstance(one, Tested) else one for one in found]


def notes(case: Case) -> Iterator[str]:
    """What a reader should know besides: what fell though nobody guards it, and rows that are used up."""
    comparison = case.inputs.comparison
    for compared in comparison.metrics:
        if compared.name not in case.deciding and compared.better == "baseline":
            yield f"{label(compared.name)} falls, and is no guard (gate.guard_metrics): {case.figures(compared)}."
    mine, theirs = comparison.candidate_characters, comparison.baseline_characters
    if mine is not None and theirs is not None and mine > _MUCH_LONGER * max(theirs, _SHORT_CHARACTERS):
        yield (
            f"The candidate's answers are much longer: {mine:,.0f} characters on average against {theirs:,.0f}. "
            "Metrics that look for something in an answer, and judges, may favour length: read some rows."
        )
    challenge = case.inputs.challenge
    if challenge is not None and challenge.number > challenge.challenges:
        yield (
            f"These rows are used up: {challenge.number - 1:,} candidates challenged {case.opponent} on them "
            "before. Take fresh test rows."
        )
