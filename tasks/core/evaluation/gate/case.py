"""What every check of the gate gets: two compared runs with all that is known of them, and how its figures are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tasks.core.evaluation.summary import (
    Challenge,
    Comparison,
    GateCheck,
    MetricComparison,
    Opponent,
    OverlapSummary,
    RunSummary,
)
from tasks.core.evaluation.wording import is_share, label, percent, shown, shown_difference
from tasks.core.metrics.judge.calibration import JudgeStanding

if TYPE_CHECKING:
    from tasks.core.config import GateConfig

Outcome = Literal["passed", "failed", "undecided", "skipped"]
_NAMES: dict[Opponent, str] = {"base": "the base model", "champion": "the champion", "run": "the baseline"}


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How far answers of the same model, given again in other batches, differ on the primary metric.

    `value` is the mean absolute difference of the rows' scores; `rows` were answered twice, `changed` differ.
    `reason` says why it is known without a measurement, or not known (`value` None).
    """

    value: float | None
    rows: int = 0
    changed: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class GateInputs:
    """Everything that the gate looks at. `comparison` is candidate against `opponent`.

    `missing_champion` says why a champion that exists could not be compared. `overlap` is None with a reason
    where it could not be looked for. `same_template` is None where the training is not known. `challenge` is None
    where nobody counts them. `judges` says for each judged metric whether it may decide.
    """

    candidate: RunSummary
    opponent: RunSummary
    comparison: Comparison
    against: Opponent
    confidence: float
    noise: NoiseFloor
    overlap: OverlapSummary | str
    same_template: bool | None = None
    missing_champion: str | None = None
    challenge: Challenge | None = None
    judges: Sequence[JudgeStanding] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """A check, and whether its failure speaks against the model (rejects) or only against the evidence."""

    check: GateCheck
    rejects: bool = False


@dataclass(frozen=True, slots=True)
class Tested:
    """A check by a two-sided p value, which all checks of this kind adjust for their number (Holm).

    `told` gives the finding for the adjusted one.
    """

    p_value: float
    told: Callable[[float], Finding]


Found = Iterable[Finding | Tested]
"""What a check gives: as a rule one finding, none where it has nothing to look at."""


@dataclass(frozen=True)
class Case:
    """One candidate against one opponent. `guards` are the metrics that must not fall."""

    inputs: GateInputs
    settings: GateConfig
    primary: MetricComparison
    guards: tuple[MetricComparison, ...]

    @property
    def alpha(self) -> float:
        """The error rate of each check."""
        return 1 - self.inputs.confidence

    @property
    def allowed(self) -> float:
        """The p value that a promotion needs: smaller after many challenges."""
        challenge = self.inputs.challenge
        return self.alpha if challenge is None else min(self.alpha, challenge.allowed_p_value)

    @property
    def opponent(self) -> str:
        """In words."""
        return _NAMES[self.inputs.against]

    @cached_property
    def deciding(self) -> tuple[str, ...]:
        """Names of the primary metric and the guards."""
        return (self.primary.name, *(guard.name for guard in self.guards))

    def may_decide(self, metric: str) -> bool:
        """Whether a metric may speak against a model: a judged one only where its judge agrees with people."""
        return all(judge.may_decide for judge in self.inputs.judges if judge.metric == metric)

    def is_share(self, compared: MetricComparison) -> bool:
        """Whether the metric's values lie between 0 and 1."""
        metric = self.inputs.candidate.metric(compared.name)
        return metric is not None and is_share(metric.minimum, metric.maximum)

    def margin(self, compared: MetricComparison) -> float:
        """By how much the metric may fall."""
        margin = self.settings.non_inferiority_margin
        return margin if self.is_share(compared) else margin * abs(compared.baseline or 0.0)

    def reach(self, compared: MetricComparison) -> float:
        """How far two values of the metric may lie apart."""
        metric = self.inputs.candidate.metric(compared.name)
        return math.inf if metric is None or metric.maximum is None else metric.maximum - metric.minimum

    def figures(self, compared: MetricComparison) -> str:
        """Both figures, their difference with its interval, and the number of rows."""
        share, interval = self.is_share(compared), compared.interval
        between = (
            f" ({percent(self.inputs.confidence)} interval {shown_difference(interval.low, share)} to "
            f"{shown_difference(interval.high, share)})"
            if interval
            else ""
        )
        return (
            f"{label(compared.name)} {shown(compared.candidate or 0.0, share)} against "
            f"{shown(compared.baseline or 0.0, share)}, {signed(compared.difference or 0.0, share)}{between} "
            f"on {compared.rows:,} rows"
        )


def check(name: str, outcome: Outcome, detail: str) -> GateCheck:
    """One thing the gate looked at; `detail` is a sentence."""
    return GateCheck(name=name, outcome=outcome, detail=detail)


def finding(name: str, outcome: Outcome, detail: str) -> Finding:
    """The same as a finding that speaks for or against the evidence only."""
    return Finding(check(name, outcome, detail))


def sign(compared: MetricComparison) -> int:
    """-1 where lower is better."""
    return -1 if compared.direction == "lower" else 1


def gain(compared: MetricComparison) -> float:
    """How much better the candidate is; negative = worse."""
    return sign(compared) * (compared.difference or 0.0)


def amount(value: float, share: bool) -> str:
    """A figure with its unit."""
    return shown(value, share) + (" points" if share else "")


def signed(value: float, share: bool) -> str:
    """A difference with its sign and unit."""
    return shown_difference(value, share) + (" points" if share else "")


def p_in_words(p_value: float) -> str:
    """As papers write it."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def round_up(rows: float) -> int:
    """Two significant digits, upwards: a planning figure, not a measurement."""
    if not math.isfinite(rows) or rows > 1e12:
        return 10**12
    step: int = 10 ** max(0, len(str(int(rows))) - 2)
    return math.ceil(rows / step) * step
