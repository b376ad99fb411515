"""Which of two runs' answers a judge prefers, row by row, put into the scores of both runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.metrics.judge.judge_metrics import NO_PARTNER, PREFERENCE, ask_rows
from tasks.core.metrics.judge.prompts import (
    JudgePrompt,
    PreferenceVerdict,
    Texts,
    Verdict,
    preference_prompt,
)
from tasks.core.metrics.metric import ERROR_ROW, ErrorPolicy, FloatArray, Sources
from tasks.core.records import Prediction

_WIN, _TIE, _LOSS = 1.0, 0.5, 0.0


def with_preference(
    tables: tuple[ScoreTable, ScoreTable],
    predictions: tuple[Iterable[Prediction], Iterable[Prediction]],
    sources: Sources,
    error_rows: ErrorPolicy,
) -> tuple[ScoreTable, ScoreTable]:
    """Judge the answers of two runs to the same rows; win, tie, loss are 1, a half and 0, and add up to 1.

    Both orders are asked (Zheng et al. 2023); verdicts that change with the order are a tie, as are equal
    answers, which are not asked. An answer loses to none by an error where errors count as wrong. Rows of one
    run only are unscored. Two calls a row.
    """
    first, second = tables
    others = {row.id: row for row in predictions[1]}
    values = np.full(first.row_count, np.nan)
    reasons: list[str | None] = [NO_PARTNER] * first.row_count
    batch: list[tuple[int, Prediction, Prediction]] = []
    for i, row in enumerate(predictions[0]):
        partner = others.get(row.id)
        if partner is not None:
            batch.append((i, row, partner))
        if len(batch) == 1000:
            _judge(batch, values, reasons, sources, error_rows)
            batch = []
    _judge(batch, values, reasons, sources, error_rows)
    place = {identifier: i for i, identifier in enumerate(first.ids)}
    places = [place.get(identifier) for identifier in second.ids]
    theirs = np.array([np.nan if i is None else 1.0 - values[i] for i in places])
    their_reasons = [NO_PARTNER if i is None else reasons[i] for i in places]
    return _with_values(first, values, reasons), _with_values(second, theirs, their_reasons)


def _judge(
    batch: Sequence[tuple[int, Prediction, Prediction]],
    values: FloatArray,
    reasons: list[str | None],
    sources: Sources,
    error_rows: ErrorPolicy,
) -> None:
    prompts: dict[int, list[JudgePrompt]] = {}
    for i, mine, theirs in batch:
        reasons[i] = None
        if mine.error is not None or theirs.error is not None:
            if error_rows == "excluded":
                reasons[i] = ERROR_ROW
            else:
                values[i] = _TIE if mine.error and theirs.error else _LOSS if mine.error else _WIN
        elif mine.predicted_answer == theirs.predicted_answer:
            values[i] = _TIE
        else:
            prompts[i] = preference_prompts(
                mine.question, mine.predicted_answer, theirs.predicted_answer, mine.references
            )
    for i, verdicts in ask_rows(sources, prompts, reasons).items():
        values[i] = preference_of(verdicts)


def preference_prompts(question: str, mine: str, other: str, reference: Texts) -> list[JudgePrompt]:
    """Both orders of two answers."""
    return [
        preference_prompt(question, mine, other, reference),
        preference_prompt(question, other, mine, reference),
    ]


def preference_of(verdicts: Sequence[Verdict]) -> float:
    """The value of the verdicts on both orders: a win or a loss only where they agree."""
    straight, swapped = (cast(PreferenceVerdict, verdict).better for verdict in verdicts)
    return {("first", "second"): _WIN, ("second", "first"): _LOSS}.get((straight, swapped), _TIE)


def _with_values(table: ScoreTable, values: FloatArray, reasons: list[str | None]) -> ScoreTable:
    scored = ~np.isnan(values)
    statistics = np.stack([np.where(scored, values, 0.0), scored.astype(float)], axis=1)
    name = PREFERENCE.name
    return replace(
        table,
        values={**table.values, name: values},
        statistics={**table.statistics, name: statistics},
        reasons={**table.reasons, name: reasons},
    )
