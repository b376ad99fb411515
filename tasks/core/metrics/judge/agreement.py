"""How far a judge agrees with people: Cohen's kappa with its interval, and what its errors lean towards."""

from __future__ import annotations

from dataclasses import dataclass
from math import atanh, tanh

import numpy as np

from tasks.core.metrics.metric import FloatArray

_PSEUDO_WEIGHT = 0.5
_MOST_LEVELS = 7
_BINS = 5


@dataclass(frozen=True, slots=True)
class Kappa:
    """Agreement beyond chance, 1 at most, with its two-sided interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Leaning:
    """How the judge's error (judge minus person, -1 to 1) goes with something: Spearman's rho and its p value."""

    rho: float
    p_value: float


def weighted_kappa(people: FloatArray, judge: FloatArray, confidence: float = 0.95) -> Kappa | None:
    """Cohen's kappa with quadratic weights (Cohen 1968) of values from 0 to 1; None where chance alone agrees fully.

    For two values it is the plain kappa (Cohen 1960), for others an intraclass correlation (Fleiss and Cohen 1973), so
    values need not be sorted into classes. The interval: jackknife error on Fisher's z scale, with one row of full
    disagreement added (half a row each way), so that a few labels that all agree do not prove a perfect judge.
    """
    from scipy.special import stdtrit

    rows = _moments(people, judge)
    value = float(_kappa_of(rows.sum(axis=0)))
    if len(rows) < 2 or not np.isfinite(value):
        return None
    weights = np.concatenate([np.ones(len(rows)), [_PSEUDO_WEIGHT] * 2])
    pseudo = _moments(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    smoothed = np.concatenate([rows, pseudo]) * weights[:, None]
    total = smoothed.sum(axis=0)
    centre = float(_kappa_of(total))
    changes = (_kappa_of(total - smoothed) - centre) / weights
    error = float(np.sqrt((weights * changes**2).sum()))
    reach = float(stdtrit(len(rows) - 1, (1 + confidence) / 2)) * error / (1 - centre**2)
    ends = [tanh(atanh(centre) + sign * reach) for sign in (-1, 1)]
    return Kappa(value, min(ends[0], value), max(ends[1], value))


def plain_kappa(people: FloatArray, judge: FloatArray) -> float | None:
    """Cohen's kappa (1960) of equal values; None where chance alone agrees fully."""
    levels = np.unique(np.concatenate([people, judge]))
    chance = sum(float((people == level).mean() * (judge == level).mean()) for level in levels)
    return None if chance >= 1 else (float((people == judge).mean()) - chance) / (1 - chance)


def leaning(errors: FloatArray, amounts: FloatArray) -> Leaning | None:
    """Whether errors go with amounts, such as lengths; None where either does not vary."""
    from scipy.stats import spearmanr

    if len(errors) < 3 or np.ptp(errors) == 0 or np.ptp(amounts) == 0:
        return None
    found = spearmanr(errors, amounts)
    return Leaning(float(found.statistic), float(found.pvalue))


def confusion(people: FloatArray, judge: FloatArray) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names of the classes and counts: a row each class of the people, a column each of the judge.

    Values are their own classes where there are few; else there are five of equal width.
    """
    levels = np.unique(np.concatenate([people, judge]).round(6))
    if len(levels) <= _MOST_LEVELS:
        names = tuple(f"{level:g}" for level in levels)
        places = [np.searchsorted(levels, values.round(6)) for values in (people, judge)]
    else:
        names = tuple(f"{i / _BINS:g} to {(i + 1) / _BINS:g}" for i in range(_BINS))
        places = [np.minimum((values * _BINS).astype(int), _BINS - 1) for values in (people, judge)]
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (places[0], places[1]), 1)
    return names, tuple(tuple(int(count) for count in row) for row in counts)


def _moments(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _kappa_of(sums: FloatArray) -> FloatArray:
    """1 - mean((x - y)^2) / (the same of independent x and y), from sums of `_moments`."""
    count, x, y, xx, yy, xy = (sums[..., i] for i in range(6))
    seen = xx + yy - 2 * xy
    chance = xx + yy - 2 * x * y / count
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - seen / np.where(chance > 1e-12, chance, np.nan))
