"""Uncertainty of scores: bootstrap intervals and paired comparisons.

Every figure is a function of summed per-row statistics (see `metric.Corpus`). A bootstrap resample
is therefore a row of counts times the matrix of statistics, for all metrics and both runs at once.
Rows that share a question are drawn together (cluster bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.metrics.metric import FloatArray

_CELLS_IN_MEMORY = 4_000_000
_SAME = 1e-12
POWER = 0.8
JACKKNIFE_T = "jackknife t"
_HEAVY = 0.25


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided interval; `method` is "BCa bootstrap", "percentile bootstrap", "jackknife t" or "no variation"."""

    low: float
    high: float
    method: str


def sum_by_cluster(statistics: FloatArray, clusters: NDArray[np.uint64]) -> FloatArray:
    """Sums of (n, width) statistics over rows of equal cluster: shape (clusters, width)."""
    unique, position = np.unique(clusters, return_inverse=True)
    if len(unique) == len(clusters):
        return statistics
    sums = np.zeros((len(unique), statistics.shape[1]))
    np.add.at(sums, position, statistics)
    return sums


def bootstrap_sums(statistics: FloatArray, *, resamples: int, seed: int) -> FloatArray:
    """Sums over rows drawn with replacement: (units, width) gives (resamples, width)."""
    units = len(statistics)
    generator = np.random.default_rng([seed, 0])

    def counts(size: int) -> FloatArray:
        drawn = generator.integers(0, units, size=(size, units), dtype=np.int64)
        drawn += np.arange(size)[:, None] * units
        return np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units).astype(np.float64)

    return _in_blocks(counts, statistics, resamples)


def swap_sums(halved_differences: FloatArray, *, resamples: int, seed: int) -> FloatArray:
    """Sums of (units, width) rows under random signs: (resamples, width), for randomisation tests."""
    units = len(halved_differences)
    generator = np.random.default_rng([seed, 1])

    def signs(size: int) -> FloatArray:
        return generator.integers(0, 2, size=(size, units), dtype=np.int8).astype(np.float64) * 2 - 1

    return _in_blocks(signs, halved_differences, resamples)


def _in_blocks(weights: Callable[[int], FloatArray], statistics: FloatArray, resamples: int) -> FloatArray:
    sums = np.empty((resamples, statistics.shape[1]))
    for start, stop in _blocks(resamples, max(1, _CELLS_IN_MEMORY // len(statistics))):
        sums[start:stop] = weights(stop - start) @ statistics
    return sums


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


def bca_interval(
    observed: float, draws: FloatArray, jackknife: FloatArray, confidence: float
) -> Interval | None:
    """Bias-corrected and accelerated interval (Efron 1987), as in scipy.stats.bootstrap.

    `draws`: figures of the resamples; `jackknife`: figures with one unit left out each.
    Falls back to the percentile interval where the correction is undefined; None without any draw.
    """
    from scipy.special import ndtr, ndtri

    draws, jackknife = draws[np.isfinite(draws)], jackknife[np.isfinite(jackknife)]
    if len(draws) == 0:
        return None
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    below = (np.mean(draws < observed) + np.mean(draws <= observed)) / 2
    spread = jackknife.mean() - jackknife if len(jackknife) else np.zeros(1)
    cubed_deviation = 6 * (spread**2).sum() ** 1.5
    if 0 < below < 1 and cubed_deviation > 0:
        bias, acceleration = ndtri(below), (spread**3).sum() / cubed_deviation
        shifted = bias + ndtri(tails)
        denominator = 1 - acceleration * shifted
        if (denominator > 0).all():
            low, high = np.quantile(draws, ndtr(bias + shifted / denominator))
            return Interval(float(low), float(high), "BCa bootstrap")
    low, high = np.quantile(draws, tails)
    return Interval(float(low), float(high), "percentile bootstrap")


def has_heavy_cluster(sizes: NDArray[np.int64]) -> bool:
    """Whether one cluster decides so much that a bootstrap of clusters does not see how uncertain the figure is.

    That is where it makes up more than a quarter of the sum of squared sizes: of rows that ask one question each, a
    question with a tenth of 30 rows or more, or a twentieth of 130.
    """
    squares = sizes.astype(np.float64) ** 2
    return bool(len(sizes)) and bool(squares.max() > _HEAVY * squares.sum()) and bool(sizes.max() > 1)


def heavy_cluster_interval(
    observed: float, jackknife: FloatArray, sizes: NDArray[np.int64], *, confidence: float, reach: float
) -> Interval:
    """Interval where one cluster holds a large part of the rows; `sizes` are the clusters' rows, `reach` the largest
    difference that there can be.

    The jackknife variance of clusters (CR3; Bell and McCaffrey 2002) with the t distribution of as many degrees of
    freedom as clusters of equal size would carry the same weight, (sum of sizes)^2 / (sum of squares), less one. The
    bootstrap of clusters covers 81 to 91 % there instead of 95 (bench/intervals.py).
    """
    from scipy.special import stdtrit

    jackknife = jackknife[np.isfinite(jackknife)]
    count = len(jackknife)
    variance = (count - 1) / count * float(((jackknife - observed) ** 2).sum()) if count else 0.0
    effective = float(sizes.sum()) ** 2 / float((sizes.astype(np.float64) ** 2).sum())
    width = float(stdtrit(max(1.0, effective - 1), (1 + confidence) / 2)) * variance**0.5
    return Interval(max(-reach, observed - width), min(reach, observed + width), JACKKNIFE_T)


def varies(draws: FloatArray) -> bool:
    """Whether resamples differ; where they do not, a bootstrap interval would have no width."""
    finite = draws[np.isfinite(draws)]
    return bool(len(finite)) and bool(np.ptp(finite) > _SAME * max(1.0, float(np.abs(finite).max())))


def no_variation_interval(
    value: float, units: int, *, minimum: float, maximum: float, confidence: float
) -> Interval:
    """Interval of a figure when no resample differs from it, as when all units have the same value.

    With 0 of n units deviating, at most q = 1 - (alpha/2)^(1/n) of all deviate (Clopper and Pearson);
    a mean then lies within q times the distance to each end of the range, and so does about every corpus figure.
    """
    deviating = 1 - ((1 - confidence) / 2) ** (1 / units)
    low = value - deviating * (value - minimum) if np.isfinite(minimum) else value
    high = value + deviating * (maximum - value) if np.isfinite(maximum) else value
    return Interval(float(low), float(high), "no variation")


def randomization_p_value(observed: float, draws: FloatArray) -> float:
    """Two-sided p value: share of random swaps with a difference at least as large (0 to 1]."""
    draws = draws[np.isfinite(draws)]
    extreme = np.count_nonzero(np.abs(draws) >= abs(observed) * (1 - 1e-9))
    return float((1 + extreme) / (1 + len(draws)))


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Exact two-sided McNemar test of paired 0/1 outcomes; ties carry no information."""
    from scipy.special import bdtr  # scipy.stats has it ready, and takes half a second to import

    # Under the null hypothesis wins and losses are as likely: both tails are the same.
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def minimum_detectable_effect(draws: FloatArray, confidence: float) -> float | None:
    """Smallest true difference found with 80 % power at this number of rows; None without spread.

    (z(1 - alpha/2) + z(0.8)) times the bootstrap standard error of the difference.
    """
    from scipy.special import ndtri

    error = standard_error(draws)
    return float((ndtri((1 + confidence) / 2) + ndtri(POWER)) * error) if error > 0 else None


def normal_quantile(probability: float) -> float:
    """The standard normal value below which lies this probability (0 to 1)."""
    from scipy.special import ndtri

    return float(ndtri(probability))


def detectable_ratio(p_value: float, usual: float) -> float:
    """How much larger a true difference must be to be found at a two-sided `p_value` instead of the `usual` one."""
    power = normal_quantile(POWER)
    return (normal_quantile(1 - p_value / 2) + power) / (normal_quantile(1 - usual / 2) + power)


def paired_difference_shown(rows: int, changed: float, p_value: float) -> float:
    """The smallest true difference of two shares (0 to 1) that paired rows show with 80 % power.

    `changed` is the share of rows on which the sides differ; normal approximation of McNemar's test.
    """
    reach = normal_quantile(1 - p_value / 2) + normal_quantile(POWER)
    return min(1.0, reach * float(np.sqrt(changed / rows)))


def paired_rows_needed(difference: float, changed: float, p_value: float) -> int:
    """How many paired rows show a true difference of two shares with 80 % power; see `paired_difference_shown`."""
    reach = normal_quantile(1 - p_value / 2) + normal_quantile(POWER)
    return int(np.ceil(changed * (reach / difference) ** 2))


def standard_error(draws: FloatArray) -> float:
    """Standard deviation of the resamples' figures; 0 without spread."""
    finite = draws[np.isfinite(draws)]
    return float(np.std(finite)) if len(finite) else 0.0


def shows_difference(interval: tuple[float, float], p_value: float, confidence: float) -> bool:
    """Whether the interval (low, high) excludes 0 and the p value agrees.

    Both must say so: on few rows a bootstrap interval alone excludes 0 too often.
    """
    low, high = interval
    return not low <= 0 <= high and p_value <= 1 - confidence


def fall_p_value(fall: float, error: float, margin: float) -> float:
    """Two-sided p value against "it fell by no more than `margin`", by the normal distribution (0 to 1].

    `fall` is how much worse the candidate is; `error` its standard error. Small when the fall is surely larger.
    """
    from scipy.special import ndtr

    return min(1.0, 2 * float(ndtr((margin - fall) / error)))


def constant_fall_p_value(fall: float, margin: float, units: int, reach: float) -> float:
    """The same where all units fell alike, so that there is no standard error: the inverse of `no_variation_interval`.

    The mean fall is at most `margin` only if a share of all units deviates, by `reach` (the range of the metric)
    upwards at most; the p value is twice the chance that none of `units` does. Without a range it is the sign test.
    """
    if fall <= margin:
        return 1.0
    deviating = (fall - margin) / (fall + reach) if np.isfinite(reach) else 0.5
    return min(1.0, 2 * float(1 - deviating) ** units)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: adjusted p values in the given order."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    adjusted, running = [0.0] * count, 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
