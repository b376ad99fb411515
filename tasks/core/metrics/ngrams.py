"""N-grams of many pairs of texts at once: their counts, and BLEU and chrF from sums of such counts.

An n-gram is packed into one integer together with its row, so that counting is sorting. The formulas and defaults are
sacrebleu's; tests hold them against it. Also the longest common subsequence of one pair, for ROUGE.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.metrics.metric import FloatArray

Tokens = Sequence[Hashable]
Integers = NDArray[np.uint64]

BLEU_ORDER = 4
BLEU_WIDTH = 2 + 2 * BLEU_ORDER
CHRF_ORDER = 6
CHRF_WIDTH = 3 * CHRF_ORDER
_CHRF_BETA_SQUARED = 4.0
_KEY_BITS = 64
_ROW_BITS = 12
_ROWS_AT_ONCE = 1 << _ROW_BITS


def count_ngrams(pairs: Sequence[tuple[Tokens, Tokens]], orders: int) -> FloatArray:
    """Shape (rows, orders, 3): n-grams of the first text, of the second, and in common (clipped).

    In common counts an n-gram as often as the text with fewer of it has it, as BLEU, chrF and ROUGE do.
    """
    counts = np.zeros((len(pairs), orders, 3))
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(pairs))
        counts[start:stop] = _count_block(pairs[start:stop], orders)
    return counts


def _count_block(pairs: Sequence[tuple[Tokens, Tokens]], orders: int) -> FloatArray:
    """Pack the rows that have few enough different tokens; count the others one by one."""
    token_bits = (_KEY_BITS - _ROW_BITS) // orders
    counts = np.zeros((len(pairs), orders, 3))
    packed: list[int] = []
    sides = _Side([], []), _Side([], [])
    for row, pair in enumerate(pairs):
        numbers = {token: number for number, token in enumerate(dict.fromkeys([*pair[0], *pair[1]]))}
        if len(numbers) > 1 << token_bits:
            counts[row] = _count_one_by_one(*pair, orders)
            continue
        packed.append(row)
        for side, tokens in zip(sides, pair, strict=True):
            side.numbers.extend(map(numbers.__getitem__, tokens))
            side.lengths.append(len(tokens))
    keys = zip(*(side.keys_by_order(orders, token_bits) for side in sides), strict=True)
    for order, (first, second) in enumerate(keys):
        counts[packed, order] = _compare(first, second, len(packed), (order + 1) * token_bits)
    return counts


@dataclass(slots=True)
class _Side:
    """One text of every gathered row, as token numbers end to end."""

    numbers: list[int]
    lengths: list[int]

    def keys_by_order(self, orders: int, token_bits: int) -> Iterator[Integers]:
        """For each order the n-grams that lie within one row: row number in the high bits, tokens below."""
        tokens = np.array(self.numbers, dtype=np.uint64)
        lengths = np.array(self.lengths, dtype=np.int64)
        rows = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))
        packed = np.zeros(len(tokens), dtype=np.uint64)
        for order in range(1, orders + 1):
            last = max(len(tokens) - order + 1, 0)
            packed = (packed[:last] << np.uint64(token_bits)) | tokens[order - 1 :]
            within = left[:last] >= order
            yield (rows[:last][within] << np.uint64(order * token_bits)) | packed[within]


def _compare(first: Integers, second: Integers, rows: int, shift: int) -> FloatArray:
    """Per row: n-grams of the first side, of the second, in common; shape (rows, 3)."""
    result = np.zeros((rows, 3))
    (found, times), (wanted, wanted_times) = (np.unique(side, return_counts=True) for side in (first, second))
    for column, (keys, counts) in enumerate(((found, times), (wanted, wanted_times))):
        result[:, column] = np.bincount((keys >> np.uint64(shift)).astype(np.int64), counts, rows)
    if len(found) and len(wanted):
        place = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        shared = wanted[place] == found
        common = np.minimum(times[shared], wanted_times[place[shared]])
        result[:, 2] = np.bincount((found[shared] >> np.uint64(shift)).astype(np.int64), common, rows)
    return result


def _count_one_by_one(first: Tokens, second: Tokens, orders: int) -> FloatArray:
    counts = np.zeros((orders, 3))
    for order in range(1, orders + 1):
        found, wanted = (
            Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
            for tokens in (first, second)
        )
        counts[order - 1] = found.total(), wanted.total(), (found & wanted).total()
    return counts


def common_subsequence_length(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence, in tokens.

    Bit-parallel: one row of the table is the bits of one integer
    (H. Hyyrö, "Bit-parallel LCS-length computation revisited", 2004).
    """
    positions: defaultdict[Hashable, int] = defaultdict(int)
    for i, token in enumerate(first):
        positions[token] |= 1 << i
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for token in second:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()


# --- figures


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
