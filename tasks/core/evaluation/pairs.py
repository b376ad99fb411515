"""Metrics that compare the answers of two runs row by row: their values, put into the scores of both runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from tasks.core.evaluation.scoring import BATCH_ROWS, ScoreTable, batched
from tasks.core.metrics.catalogue import reported
from tasks.core.metrics.metric import (
    ERROR_ROW,
    NO_PARTNER,
    BatchScores,
    ErrorPolicy,
    FloatArray,
    Metric,
    MetricFamily,
    ScorePairs,
    Sources,
)
from tasks.core.records import Prediction

_Pair = tuple[Prediction, Prediction]


class Partners:
    """The rows of another run, one for each row that is asked for; held in memory is only what it has elsewhere.

    Runs of the same rows have them in the same order, so a million of them take no more memory than one.
    """

    def __init__(self, others: Iterable[Prediction]) -> None:
        self._others = iter(others)
        self._waiting: dict[str, Prediction] = {}

    def of(self, row_id: str) -> Prediction | None:
        """The other run's row of this id, once; None where it has none, after all its rows have been read."""
        while row_id not in self._waiting:
            other = next(self._others, None)
            if other is None:
                return None
            self._waiting[other.id] = other
        return self._waiting.pop(row_id)


def score_pairs(
    tables: tuple[ScoreTable, ScoreTable],
    predictions: tuple[Iterable[Prediction], Iterable[Prediction]],
    families: Sequence[MetricFamily],
    sources: Sources,
    error_rows: ErrorPolicy,
) -> tuple[ScoreTable, ScoreTable]:
    """The tables of two runs with what the families that have `pairs` find of their answers to the same rows.

    An answer loses to none by an error where errors count as wrong; two errors are a tie. Rows of one run only are
    unscored.
    """
    first, second = tables
    scorers = [(family.metrics, family.pairs(sources)) for family in families if family.pairs is not None]
    metrics = reported(family for family in families if family.pairs is not None)
    values = {metric.name: np.full(first.row_count, np.nan) for metric in metrics}
    reasons = {metric.name: np.full(first.row_count, NO_PARTNER, dtype=object) for metric in metrics}
    found = _pairs(*predictions, frozenset(second.ids))
    for batch in batched(found, BATCH_ROWS):
        rows, pairs = [i for i, _ in batch], [pair for _, pair in batch]
        for family_metrics, score in scorers:
            scores = _scored(pairs, family_metrics, score, error_rows)
            for name, of_batch in scores.values.items():
                values[name][rows], reasons[name][rows] = of_batch, scores.reasons
    place = {identifier: i for i, identifier in enumerate(first.ids)}
    places = [place.get(identifier) for identifier in second.ids]
    for metric in metrics:
        mine, told = values[metric.name], reasons[metric.name].tolist()
        theirs = np.array([np.nan if i is None else 2 * metric.middle - mine[i] for i in places])
        first = _with_values(first, metric.name, mine, told)
        told = [NO_PARTNER if i is None else told[i] for i in places]
        second = _with_values(second, metric.name, theirs, told)
    return first, second


def _pairs(
    rows: Iterable[Prediction], others: Iterable[Prediction], ids: frozenset[str]
) -> Iterator[tuple[int, _Pair]]:
    """Number and both answers of each row that the other run has too; `ids` are all of that run."""
    partners = Partners(others)
    for number, row in enumerate(rows):
        partner = partners.of(row.id) if row.id in ids else None
        if partner is not None:
            yield number, (row, partner)


def _scored(
    pairs: Sequence[_Pair], metrics: Sequence[Metric], score: ScorePairs, error_rows: ErrorPolicy
) -> BatchScores:
    """Scores of all pairs: of those without an error by `score`, of the others as the policy says."""
    whole = [i for i, (mine, other) in enumerate(pairs) if mine.error is None and other.error is None]
    scores = score([pairs[i] for i in whole])
    reasons: list[str | None] = [ERROR_ROW if error_rows == "excluded" else None] * len(pairs)
    for i, reason in zip(whole, scores.reasons, strict=True):
        reasons[i] = reason
    values = {}
    for metric in metrics:
        failed = [np.nan if error_rows == "excluded" else _of_failed(metric, *pair) for pair in pairs]
        values[metric.name] = np.array(failed)
        values[metric.name][whole] = scores.values[metric.name]
    return BatchScores(values, reasons)


def _of_failed(metric: Metric, mine: Prediction, other: Prediction) -> float:
    if mine.error is not None and other.error is not None:
        return metric.middle
    return metric.worst if mine.error is not None else 2 * metric.middle - metric.worst


def _with_values(table: ScoreTable, name: str, values: FloatArray, reasons: list[str | None]) -> ScoreTable:
    scored = ~np.isnan(values)
    statistics = np.stack([np.where(scored, values, 0.0), scored.astype(float)], axis=1)
    return replace(
        table,
        values={**table.values, name: values},
        statistics={**table.statistics, name: statistics},
        reasons={**table.reasons, name: reasons},
    )
