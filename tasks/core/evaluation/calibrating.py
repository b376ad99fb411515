"""Compare a judge with people: let it judge labelled rows, and measure how far both agree and where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.core.errors import EvaluationError
from tasks.core.metrics.catalogue import family_of, prompt_sha256, resolve
from tasks.core.metrics.judge.agreement import Leaning, confusion, leaning, plain_kappa, weighted_kappa
from tasks.core.metrics.judge.calibration import JudgeCalibration
from tasks.core.metrics.judge.judge_metrics import ask_rows
from tasks.core.metrics.judge.judged import PositionBias
from tasks.core.metrics.judge.labels import LabelFile, LabelledRow
from tasks.core.metrics.metric import FloatArray, ScoredRun
from tasks.core.metrics.models.scoring_models import ScoringModels
from tasks.core.provenance import now
from tasks.core.records import Prediction, PredictionMetadata

_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class DifferingRow:
    """A row that the judge sees otherwise than the person."""

    row: LabelledRow
    judged: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A judge against people on one metric. `longer` and `shorter` are mean errors (judge minus person) of the halves

    of the rows by the answer's length (of two answers: by how much longer the first one is).
    """

    record: JudgeCalibration
    mean_error: float
    position: PositionBias | None
    length: Leaning | None
    shorter: float | None
    longer: float | None
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    differing: tuple[DifferingRow, ...]
    unjudged: tuple[tuple[LabelledRow, str], ...]


def calibrate(labels: LabelFile, models: ScoringModels) -> tuple[Calibrated, ...]:
    """Judge the labelled rows of each metric; replies that are there are not asked for again.

    Raises EvaluationError when the judge cannot be asked, or has no verdict on any row.
    """
    models.probe()
    return tuple(_calibrated(metric, rows, labels, models) for metric, rows in labels.rows.items())


def _calibrated(
    metric: str, rows: Sequence[LabelledRow], labels: LabelFile, models: ScoringModels
) -> Calibrated:
    values, reasons, position = _judged(metric, rows, models)
    scored = [i for i, reason in enumerate(reasons) if reason is None]
    if not scored:
        raise EvaluationError(
            f"the judge has no verdict on any of {len(rows):,} rows for {metric}: {reasons[0]}",
            "see docs/judge.md, When something goes wrong",
        )
    people = np.array([rows[i].label for i in scored])
    judge = np.clip(values[scored], 0.0, 1.0)
    kappa, errors = weighted_kappa(people, judge), judge - people
    lengths = np.array([float(_length(rows[i])) for i in scored])
    long = lengths > np.median(lengths)
    classes, table = confusion(people, judge)
    usage = models.judge.usage()
    record = JudgeCalibration(
        metric=metric,
        model=usage.model,
        endpoint=usage.endpoint,
        judge=models.judge_identity(metric),
        prompt_sha256=prompt_sha256(metric),
        kappa=None if kappa is None else round(kappa.value, 6),
        low=None if kappa is None else round(kappa.low, 6),
        high=None if kappa is None else round(kappa.high, 6),
        plain_kappa=plain_kappa(people, judge),
        agreement=float((np.abs(errors) <= _SAME).mean()),
        rows=len(scored),
        unjudged_rows=len(rows) - len(scored),
        labels_sha256=labels.sha256,
        at=now(),
    )
    differing = [
        DifferingRow(rows[i], float(value))
        for i, value in zip(scored, judge, strict=True)
        if abs(value - rows[i].label) > _SAME
    ]
    differing.sort(key=lambda one: -abs(one.judged - one.row.label))
    return Calibrated(
        record=record,
        mean_error=float(errors.mean()),
        position=position,
        length=leaning(errors, lengths),
        shorter=float(errors[~long].mean()) if (~long).any() else None,
        longer=float(errors[long].mean()) if long.any() else None,
        classes=classes,
        confusion=table,
        differing=tuple(differing),
        unjudged=tuple((row, reason) for row, reason in zip(rows, reasons, strict=True) if reason),
    )


def _length(row: LabelledRow) -> int:
    return len(row.answer) - len(row.other or "")


def _judged(
    metric: str, rows: Sequence[LabelledRow], models: ScoringModels
) -> tuple[FloatArray, list[str | None], PositionBias | None]:
    reasons: list[str | None] = [None] * len(rows)
    family = family_of(metric)
    orders = None if family is None or family.judged is None else family.judged.orders
    if orders is None:
        (family,) = resolve((metric,), ScoredRun(models, None))
        scores = family.score([_prediction(row) for row in rows])
        return scores.values[metric], list(scores.reasons), None
    values = np.full(len(rows), np.nan)
    prompts = {
        i: orders.prompts(row.question, row.answer, row.other or "", row.reference or ())
        for i, row in enumerate(rows)
    }
    verdicts = ask_rows(models, prompts, reasons)
    for i, both in verdicts.items():
        values[i] = orders.value(both)
    return values, reasons, orders.bias(list(verdicts.values())) if verdicts else None


def _prediction(row: LabelledRow) -> Prediction:
    return Prediction(
        id=str(row.line),
        question=row.question,
        system_prompt=None,
        predicted_answer=row.answer,
        ground_truth=row.reference,
        error=None,
        metadata=PredictionMetadata(token_count=0, finish_reason="stop"),
    )
