"""Figures of one run with their intervals, from its table of scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import EvaluationSettings, MetricSummary, ScoreInterval
from tasks.core.metrics.metric import FloatArray, Metric

TIE = 1e-12
_DIGITS = 10


def rounded(value: float | None) -> float | None:
    """Ten decimals: hides the order in which a machine adds, so equal inputs give equal files."""
    return None if value is None or not np.isfinite(value) else round(float(value), _DIGITS) + 0.0


@dataclass(frozen=True, slots=True)
class StatisticsMatrix:
    """The statistics of several metrics side by side: one row per cluster of equal questions."""

    statistics: FloatArray
    columns: dict[str, slice]

    @classmethod
    def of(cls, parts: dict[str, FloatArray], clusters: NDArray[np.uint64]) -> StatisticsMatrix:
        columns, start = {}, 0
        for name, part in parts.items():
            columns[name] = slice(start, start + part.shape[1])
            start += part.shape[1]
        return cls(stats.sum_by_cluster(np.concatenate(list(parts.values()), axis=1), clusters), columns)

    def figures(self, metric: Metric, sums: FloatArray) -> FloatArray:
        figures: FloatArray = metric.corpus.figure(sums[..., self.columns[metric.name]])
        return figures

    def without_one(self) -> FloatArray:
        """Sums with one cluster left out, for each cluster."""
        sums: FloatArray = self.statistics.sum(axis=0) - self.statistics
        return sums


def written_interval(interval: stats.Interval | None) -> ScoreInterval | None:
    if interval is None:
        return None
    low, high = rounded(interval.low), rounded(interval.high)
    return None if low is None or high is None else ScoreInterval(low=low, high=high, method=interval.method)


def summarize_metrics(table: ScoreTable, settings: EvaluationSettings) -> tuple[MetricSummary, ...]:
    """Each metric's figure over all rows with its interval."""
    matrix = StatisticsMatrix.of(table.statistics, table.questions)
    sums = stats.bootstrap_sums(matrix.statistics, resamples=settings.bootstrap_resamples, seed=settings.seed)
    return tuple(_summarize(table, metric, matrix, sums, settings) for metric in table.metrics)


def _summarize(
    table: ScoreTable,
    metric: Metric,
    matrix: StatisticsMatrix,
    sums: FloatArray,
    settings: EvaluationSettings,
) -> MetricSummary:
    values, reasons = table.values[metric.name], table.reasons[metric.name]
    scored = ~np.isnan(values)
    figure = float(matrix.figures(metric, matrix.statistics.sum(axis=0)))
    interval = None
    if scored.any():
        draws = matrix.figures(metric, sums)
        if not stats.varies(draws):
            interval = stats.no_variation_interval(
                figure,
                len(np.unique(table.questions[scored])),
                minimum=metric.minimum,
                maximum=metric.maximum,
                confidence=settings.confidence,
            )
        else:
            jackknife = matrix.figures(metric, matrix.without_one())
            interval = stats.bca_interval(figure, draws, jackknife, settings.confidence)
    errors_scored = int(np.count_nonzero(table.errors & scored))
    return MetricSummary(
        name=metric.name,
        description=metric.description,
        source=metric.source,
        kind=metric.kind,
        direction=metric.direction,
        minimum=metric.minimum,
        maximum=metric.maximum if np.isfinite(metric.maximum) else None,
        aggregate=metric.corpus.name,
        value=rounded(figure) if scored.any() else None,
        interval=written_interval(interval),
        mean_of_rows=rounded(float(values[scored].mean())) if scored.any() else None,
        scored_rows=int(scored.sum()),
        unscored_rows=int((~scored).sum()),
        unscored_reasons=dict(sorted(Counter(filter(None, reasons)).items())),
        errors_counted_as_wrong=errors_scored,
    )
