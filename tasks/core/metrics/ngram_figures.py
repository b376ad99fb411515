"""BLEU and chrF from sums of n-gram counts, for many rows or resamples at once.

Same formulas and defaults as sacrebleu; tests hold them against it.
"""

from __future__ import annotations

import numpy as np

from tasks.core.metrics.metric import FloatArray

BLEU_ORDER = 4
BLEU_WIDTH = 2 + 2 * BLEU_ORDER
CHRF_ORDER = 6
CHRF_WIDTH = 3 * CHRF_ORDER
_CHRF_BETA_SQUARED = 4.0


def bleu_statistics(counts: FloatArray) -> FloatArray:
    """Word counts of shape (rows, 4, 3) as BLEU's statistics, shape (rows, 10).

    The ten: answer length, reference length, four matched and four answer n-gram counts.
    """
    answer, reference, common = np.moveaxis(counts, -1, 0)
    return np.concatenate([answer[:, :1], reference[:, :1], common, answer], axis=1)


def bleu_figure(sums: FloatArray) -> FloatArray:
    """Corpus BLEU (0 to 1) with "exp" smoothing for sums of shape (..., 10)."""
    total = sums[..., 2 + BLEU_ORDER :]
    return np.where((total > 0).all(axis=-1), sentence_bleu(sums), 0.0)


def sentence_bleu(sums: FloatArray) -> FloatArray:
    """BLEU (0 to 1) over the orders that the answer is long enough for, for sums of shape (..., 10)."""
    answer_length, reference_length = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    counted = total > 0
    halvings = np.cumsum((matched == 0) & counted, axis=-1)
    hits = np.where(matched == 0, 0.5**halvings, matched)
    logs = np.log(np.divide(hits, total, out=np.ones_like(total), where=counted))
    orders = np.maximum(counted.sum(axis=-1), 1)
    ratio = np.divide(
        reference_length, answer_length, out=np.full_like(answer_length, np.inf), where=answer_length > 0
    )
    brevity = np.exp(np.minimum(0.0, 1.0 - ratio))
    bleu = brevity * np.exp(np.where(counted, logs, 0.0).sum(axis=-1) / orders)
    figure: FloatArray = np.where((matched > 0).any(axis=-1), np.minimum(bleu, 1.0), 0.0)
    return figure


def chrf_statistics(counts: FloatArray) -> FloatArray:
    """Character counts of shape (rows, 6, 3) as chrF's statistics, shape (rows, 18).

    As in sacrebleu, n-grams of the answer do not count where the reference is too short to have any.
    """
    statistics = counts.copy()
    statistics[..., 0] *= statistics[..., 1] > 0
    return statistics.reshape(len(counts), CHRF_WIDTH)


def chrf_figure(sums: FloatArray) -> FloatArray:
    """chrF2 (0 to 1) for sums of shape (..., 18): F-score of mean precision and mean recall.

    Orders for which either side has no n-grams are left out.
    """
    shape = (*sums.shape[:-1], CHRF_ORDER, 3)
    in_answer, in_reference, common = np.moveaxis(sums.reshape(shape), -1, 0)
    counted = (in_answer > 0) & (in_reference > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = np.divide(common, in_answer, out=np.zeros_like(common), where=counted).sum(axis=-1) / orders
    recall = np.divide(common, in_reference, out=np.zeros_like(common), where=counted).sum(axis=-1) / orders
    weighted = _CHRF_BETA_SQUARED * precision + recall
    figure: FloatArray = np.divide(
        (1 + _CHRF_BETA_SQUARED) * precision * recall,
        weighted,
        out=np.zeros_like(weighted),
        where=weighted > 0,
    )
    return figure
