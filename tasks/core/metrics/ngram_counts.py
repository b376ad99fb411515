"""Counts of n-grams for many pairs of texts at once, and the longest common subsequence of one pair.

An n-gram is packed into one integer together with its row, so that counting is sorting.
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
