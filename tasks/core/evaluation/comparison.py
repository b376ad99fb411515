"""The paired comparison of two runs on the rows they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import EvaluationError
from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.figures import TIE, StatisticsMatrix, rounded, written_interval
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import (
    Comparison,
    EvaluationSettings,
    MetricComparison,
    RateComparison,
    Winner,
    WorstCase,
)
from tasks.core.metrics.metric import MEAN, FloatArray, Metric

Flags = NDArray[np.bool_]

_LEAST_PAIRED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Pairing:
    """Positions of the same rows in candidate and baseline, in the candidate's order."""

    candidate: NDArray[np.int64]
    baseline: NDArray[np.int64]


def pair_rows(candidate: ScoreTable, baseline: ScoreTable) -> Pairing:
    """Pair rows by id.

    Raises EvaluationError when less than half of the smaller run's rows have a partner.
    """
    position = {identifier: i for i, identifier in enumerate(baseline.ids)}
    pairs = [
        (i, position[identifier]) for i, identifier in enumerate(candidate.ids) if identifier in position
    ]
    smaller = min(candidate.row_count, baseline.row_count)
    if len(pairs) < _LEAST_PAIRED_SHARE * smaller or not pairs:
        raise EvaluationError(
            f"only {len(pairs)} rows are in both runs (candidate {candidate.row_count}, "
            f"baseline {baseline.row_count})",
            "compare runs over the same test rows, or evaluate without a baseline "
            '(baseline = "none" in [evaluator])',
        )
    left, right = np.array(pairs, dtype=np.int64).T
    return Pairing(left, right)


def compare_tables(
    candidate: ScoreTable,
    baseline: ScoreTable,
    settings: EvaluationSettings,
) -> Comparison:
    """Compare two runs, metric by metric, on the rows that both have and on which neither failed.

    A row that failed is no evidence of skill: not of the model that failed, and not of the other one.
    """
    pairing = pair_rows(candidate, baseline)
    other_reference = candidate.references[pairing.candidate] != baseline.references[pairing.baseline]
    other_question = candidate.questions[pairing.candidate] != baseline.questions[pairing.baseline]
    compared = _Paired(candidate, baseline, pairing, settings)
    metrics = [compared.compare(metric) for metric in compared.metrics]
    metrics = _with_worst_cases(metrics, candidate, baseline, pairing, settings)
    tested = [
        (i, m.p_value)
        for i, m in enumerate(metrics)
        if m.p_value is not None and m.direction != "none"  # nothing is claimed about the others
    ]
    for (i, _), adjusted in zip(tested, stats.holm([p for _, p in tested]), strict=True):
        metrics[i] = metrics[i].model_copy(update={"p_value_holm": rounded(adjusted)})
    return Comparison(
        paired_rows=len(pairing.candidate),
        only_candidate_rows=candidate.row_count - len(pairing.candidate),
        only_baseline_rows=baseline.row_count - len(pairing.candidate),
        different_reference_rows=int(np.count_nonzero(other_reference)),
        different_question_rows=int(np.count_nonzero(other_question)),
        failed_rows=int(np.count_nonzero(compared.failed)),
        metrics=tuple(metrics),
        rates=tuple(_rates(candidate, baseline, pairing, compared.failed)),
        candidate_characters=_mean_length(candidate, pairing.candidate[~compared.failed]),
        baseline_characters=_mean_length(baseline, pairing.baseline[~compared.failed]),
    )


def _with_worst_cases(
    compared: list[MetricComparison],
    candidate: ScoreTable,
    baseline: ScoreTable,
    pairing: Pairing,
    settings: EvaluationSettings,
) -> list[MetricComparison]:
    """Tell what each comparison is when the candidate did its worst where it failed or is unscored."""
    worst, changed = _at_worst(candidate, baseline, pairing)
    if not changed:
        return compared
    anew = _Paired(worst, baseline, pairing, settings)
    told = []
    for metric, found in zip(anew.metrics, compared, strict=True):
        if metric.name in changed:
            other = anew.compare(metric)
            figures = {name: getattr(other, name) for name in WorstCase.model_fields}
            found = found.model_copy(update={"worst_case": WorstCase(**figures)})
        told.append(found)
    return told


def _at_worst(
    candidate: ScoreTable, baseline: ScoreTable, pairing: Pairing
) -> tuple[ScoreTable, frozenset[str]]:
    """The candidate's table with the worst value wherever it has none but the baseline has; which metrics change."""
    values, statistics, changed = dict(candidate.values), dict(candidate.statistics), set()
    failed = candidate.errors[pairing.candidate]
    for metric in candidate.metrics:
        if metric.direction == "none" or not np.isfinite(metric.worst) or metric.name not in baseline.values:
            continue
        scored = ~np.isnan(baseline.values[metric.name][pairing.baseline])
        if metric.about_the_answer:
            scored &= ~baseline.errors[pairing.baseline]
        missing = (np.isnan(values[metric.name][pairing.candidate]) | failed) & scored
        if not missing.any():
            continue
        rows = pairing.candidate[missing]
        changed.add(metric.name)
        values[metric.name] = values[metric.name].copy()
        values[metric.name][rows] = metric.worst
        if metric.corpus is MEAN:  # else a failed row has the statistics of an empty answer
            statistics[metric.name] = statistics[metric.name].copy()
            statistics[metric.name][rows] = (metric.worst, 1.0)
    answered = np.zeros_like(candidate.errors)
    table = replace(candidate, values=values, statistics=statistics, errors=answered)
    return table, frozenset(changed)


def _rates(
    candidate: ScoreTable, baseline: ScoreTable, pairing: Pairing, failed: Flags
) -> Iterator[RateComparison]:
    """Errors over all paired rows; empty and cut answers where neither run failed."""
    answered, everywhere = ~failed, np.ones_like(failed)
    flags: tuple[tuple[Literal["empty", "cut", "error"], Flags, Flags, Flags], ...] = (
        ("empty", candidate.empty, baseline.empty, answered),
        ("cut", candidate.truncated, baseline.truncated, answered),
        ("error", candidate.errors, baseline.errors, everywhere),
    )
    for name, mine, theirs, counted in flags:
        left, right = mine[pairing.candidate][counted], theirs[pairing.baseline][counted]
        only_left, only_right = int((left & ~right).sum()), int((right & ~left).sum())
        yield RateComparison(
            name=name,
            rows=int(counted.sum()),
            candidate=int(left.sum()),
            baseline=int(right.sum()),
            only_candidate=only_left,
            only_baseline=only_right,
            p_value=rounded(stats.mcnemar_p_value(only_left, only_right)) or 0.0,
        )


class _Paired:
    """Both runs' statistics on shared rows, their common resamples and their random swaps."""

    def __init__(
        self,
        candidate: ScoreTable,
        baseline: ScoreTable,
        pairing: Pairing,
        settings: EvaluationSettings,
    ) -> None:
        self.metrics = [metric for metric in candidate.metrics if metric.name in baseline.values]
        self._settings = settings
        self._questions = candidate.questions[pairing.candidate]
        self.failed = candidate.errors[pairing.candidate] | baseline.errors[pairing.baseline]
        self._values = {
            metric.name: (
                self._without_failed(metric, candidate.values[metric.name][pairing.candidate]),
                self._without_failed(metric, baseline.values[metric.name][pairing.baseline]),
            )
            for metric in self.metrics
        }
        names = [metric.name for metric in self.metrics]
        left = _both_scored(names, candidate, pairing.candidate, self._values)
        right = _both_scored(names, baseline, pairing.baseline, self._values)
        self._left, self._right = (
            StatisticsMatrix.of(left, self._questions),
            StatisticsMatrix.of(right, self._questions),
        )
        both = np.concatenate([self._left.statistics, self._right.statistics], axis=1)
        width = self._left.statistics.shape[1]
        sums = stats.bootstrap_sums(both, resamples=settings.bootstrap_resamples, seed=settings.seed)
        self._left_sums, self._right_sums = sums[:, :width], sums[:, width:]
        swaps = stats.swap_sums(
            (self._left.statistics - self._right.statistics) / 2,
            resamples=settings.bootstrap_resamples,
            seed=settings.seed,
        )
        middle = (self._left.statistics + self._right.statistics).sum(axis=0) / 2
        self._swapped = middle + swaps, middle - swaps

    def _without_failed(self, metric: Metric, values: FloatArray) -> FloatArray:
        return np.where(self.failed, np.nan, values) if metric.about_the_answer else values

    def _difference(self, metric: Metric, left: FloatArray, right: FloatArray) -> FloatArray:
        return self._left.figures(metric, left) - self._right.figures(metric, right)

    def compare(self, metric: Metric) -> MetricComparison:
        left, right = self._values[metric.name]
        scored = ~(np.isnan(left) | np.isnan(right))
        gains = left[scored] - right[scored]
        figures = [
            float(matrix.figures(metric, matrix.statistics.sum(axis=0)))
            for matrix in (self._left, self._right)
        ]
        difference = figures[0] - figures[1]
        clusters = len(np.unique(self._questions[scored]))
        draws = self._difference(metric, self._left_sums, self._right_sums)
        interval = self._difference_interval(metric, difference, draws, clusters) if len(gains) else None
        sign = -1 if metric.direction == "lower" else 1
        directed = metric.direction != "none"
        wins, losses = int((sign * gains > TIE).sum()), int((sign * gains < -TIE).sum())
        p_value, method = self._p_value(metric, difference, wins, losses, clusters == len(gains))
        effect = stats.minimum_detectable_effect(draws, self._settings.confidence) if len(gains) else None
        return MetricComparison(
            name=metric.name,
            direction=metric.direction,
            rows=len(gains),
            one_sided_rows=int((np.isnan(left) ^ np.isnan(right)).sum()),
            clusters=clusters,
            largest_cluster_rows=_largest(self._questions[scored]),
            candidate=rounded(figures[0]),
            baseline=rounded(figures[1]),
            difference=rounded(difference),
            interval=written_interval(interval),
            standard_error=rounded(stats.standard_error(draws)) if len(gains) else None,
            p_value=rounded(p_value) if len(gains) else None,
            p_value_method=method,
            p_value_holm=None,
            wins=wins if directed else None,
            ties=len(gains) - wins - losses if directed else None,
            losses=losses if directed else None,
            minimum_detectable_effect=rounded(effect),
            better=_winner(interval, p_value, sign, self._settings.confidence) if directed else "undecided",
        )

    def _difference_interval(
        self, metric: Metric, difference: float, draws: FloatArray, clusters: int
    ) -> stats.Interval | None:
        if not stats.varies(draws):
            reach = metric.maximum - metric.minimum
            return stats.no_variation_interval(
                difference, clusters, minimum=-reach, maximum=reach, confidence=self._settings.confidence
            )
        jackknife = self._difference(metric, self._left.without_one(), self._right.without_one())
        sizes = np.unique(self._questions, return_counts=True)[1]
        if stats.has_heavy_cluster(sizes):
            reach = metric.maximum - metric.minimum
            return stats.heavy_cluster_interval(
                difference, jackknife, sizes, confidence=self._settings.confidence, reach=reach
            )
        return stats.bca_interval(difference, draws, jackknife, self._settings.confidence)

    def _p_value(
        self, metric: Metric, difference: float, wins: int, losses: int, rows_are_independent: bool
    ) -> tuple[float, str]:
        if metric.kind == "binary" and rows_are_independent:
            return stats.mcnemar_p_value(wins, losses), "McNemar exact"
        draws = self._difference(metric, *self._swapped)
        return stats.randomization_p_value(difference, draws), "paired randomisation"


def _both_scored(
    names: Sequence[str],
    table: ScoreTable,
    rows: NDArray[np.int64],
    values: dict[str, tuple[FloatArray, FloatArray]],
) -> dict[str, FloatArray]:
    """Statistics of the paired rows, zeroed where either side is unscored."""
    parts = {}
    for name in names:
        left, right = values[name]
        scored = ~(np.isnan(left) | np.isnan(right))
        parts[name] = np.where(scored[:, None], table.statistics[name][rows], 0.0)
    return parts


def _winner(interval: stats.Interval | None, p_value: float, sign: int, confidence: float) -> Winner:
    if interval is None or not stats.shows_difference((interval.low, interval.high), p_value, confidence):
        return "undecided"
    return "candidate" if sign * interval.low > 0 else "baseline"


def _mean_length(table: ScoreTable, rows: NDArray[np.int64]) -> float | None:
    return rounded(float(table.characters[rows].mean())) if len(rows) else None


def _largest(questions: NDArray[np.uint64]) -> int:
    """Rows of the question that most rows ask; 0 without rows."""
    return int(np.unique(questions, return_counts=True)[1].max()) if len(questions) else 0
