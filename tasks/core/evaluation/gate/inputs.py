"""What the gate looks at: the compared runs, and all that is known besides their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.core.evaluation.summary import (
    Challenge,
    Comparison,
    Opponent,
    OverlapSummary,
    RunSummary,
)
from tasks.core.metrics.judge.calibration import JudgeStanding


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
