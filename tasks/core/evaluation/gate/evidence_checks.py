"""Whether two runs' rows can carry a verdict: the same rows, enough of them, scored, and answered on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.gate.origin_checks import check
from tasks.core.evaluation.summary import GateCheck, MetricComparison, RateComparison
from tasks.core.evaluation.wording import label, percent

if TYPE_CHECKING:
    from tasks.core.config import GateConfig
    from tasks.core.evaluation.gate.inputs import GateInputs

RATE_OF_METRIC = {"empty_rate": "empty", "truncation_rate": "cut"}
"""Which always watched rate a metric shows too."""
_RATES = {
    "empty": ("Empty answers do not become more", "answers are empty"),
    "cut": ("Cut answers do not become more", "answers were cut at the token limit"),
    "error": ("Failed rows do not become more", "rows have an error"),
}


@dataclass(frozen=True, slots=True)
class RateRise:
    """A rate that is watched whatever is measured. `is_shown`: more often with the candidate, and not by chance.

    `beyond_p_value`: two-sided p value against "it rose by no more than the margin".
    """

    rate: RateComparison
    is_shown: bool
    beyond_p_value: float
    margin: float

    def check(self, is_beyond: bool, opponent: str) -> GateCheck:
        """What the gate says of it; `is_beyond` tells whether the rise is surely larger than the margin."""
        name, happened = _RATES[self.rate.name]
        told = (
            f"{self.rate.candidate:,} of {self.rate.rows:,} {happened}, "
            f"and {self.rate.baseline:,} with {opponent}"
        )
        if self.is_shown and is_beyond:
            return check(name, "failed", f"{told}: a rise of more than {percent(self.margin)}.")
        return check(name, "undecided" if self.is_shown else "passed", f"{told}.")


def rate_rises(inputs: GateInputs, settings: GateConfig, watched: set[str]) -> list[RateRise]:
    """The watched rates; p values of their rises are adjusted for their number (Holm)."""
    rates = [rate for rate in inputs.comparison.rates if rate.name in watched]
    alpha, margin = 1 - inputs.confidence, settings.non_inferiority_margin
    adjusted = stats.holm([rate.p_value if rate.rise > 0 else 1.0 for rate in rates])
    return [
        RateRise(rate, rate.rise > 0 and p <= alpha, _beyond_p_value(rate, margin), margin)
        for rate, p in zip(rates, adjusted, strict=True)
    ]


def _beyond_p_value(rate: RateComparison, margin: float) -> float:
    """By the normal distribution of a difference of paired shares."""
    if rate.rise <= 0:
        return 1.0
    changed = rate.only_candidate + rate.only_baseline
    error = sqrt(max(0.0, changed / rate.rows - rate.rise**2) / rate.rows)
    if error == 0:  # every answer of the candidate and none of the opponent's
        return stats.constant_fall_p_value(rate.rise, margin, rate.rows, 1.0)
    return stats.fall_p_value(rate.rise, error, margin)


def evidence_checks(
    inputs: GateInputs,
    settings: GateConfig,
    primary: MetricComparison,
    guards: Sequence[MetricComparison],
) -> Iterator[GateCheck]:
    """Whether enough rows are the same in both runs and scored."""
    yield _same_rows_check(inputs, settings)
    least, found = settings.minimum_rows, primary.clusters
    told = f"{found:,} different questions are scored in both runs; at least {least:,} are asked for."
    if primary.interval is not None and primary.interval.method == stats.JACKKNIFE_T:
        told += (
            f" One question is asked in {primary.largest_cluster_rows:,} of {primary.rows:,} rows, so the interval "
            "is wider."
        )
    yield check("Enough rows", "passed" if found >= least else "undecided", told)
    if inputs.comparison.paired_rows > inputs.comparison.failed_rows:
        yield _scored_check(inputs, settings, primary, guards)


def _same_rows_check(inputs: GateInputs, settings: GateConfig) -> GateCheck:
    comparison, name = inputs.comparison, "The same rows"
    counts = (
        (comparison.only_candidate_rows, "are only in the candidate's run"),
        (comparison.only_baseline_rows, "are only in the other run"),
        (comparison.different_question_rows, "ask something else in both runs"),
        (comparison.different_reference_rows, "have another reference in both runs"),
    )
    rows = comparison.paired_rows + comparison.only_candidate_rows + comparison.only_baseline_rows
    told = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    if not told:
        return check(name, "passed", f"Both runs answer the same {rows:,} rows.")
    told = f"Of {rows:,} rows {told}; {percent(settings.maximum_unscored_rate)} are allowed"
    if comparison.unlike_rows <= settings.maximum_unscored_rate * rows:
        return check(name, "passed", f"{told}.")
    return check(
        name, "undecided", f"{told} (gate.maximum_unscored_rate): let both models answer the same rows."
    )


def _scored_check(
    inputs: GateInputs,
    settings: GateConfig,
    primary: MetricComparison,
    guards: Sequence[MetricComparison],
) -> GateCheck:
    """Rows that fell out of the figures: the better or the worse ones of a run may be among them.

    A guard that neither run has for a row (its reference has no number, say) hides nothing; it is left out.
    """
    answered = inputs.comparison.paired_rows - inputs.comparison.failed_rows
    missing = {primary.name: (answered - primary.rows, "is missing")}
    missing |= {guard.name: (guard.one_sided_rows, "is missing in one run") for guard in guards}
    worst = max(missing, key=lambda name: missing[name][0])
    rows, how = missing[worst]
    allowed, name = settings.maximum_unscored_rate, "Enough rows scored"
    told = f"{label(worst)} {how} for {rows:,} of {answered:,} rows; {percent(allowed)} are allowed"
    if rows <= allowed * answered:
        return check(name, "passed", f"{told}.")
    return check(name, "undecided", f"{told} (gate.maximum_unscored_rate); the report says why.")
