"""Shards: the rows of a run split by content, so that several processes or machines answer them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from tasks.core.runs.ledger import Ids, Mask

Numbers = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Shard:
    """One part of a run: number `index` (from 0) of `count`."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """Its directory's name, e.g. `0-of-4`."""
        return f"{self.index}-of-{self.count}"

    def mask(self, ids: Ids) -> Mask:
        """Tell for each row whether it is in this shard."""
        mine: Mask = shard_numbers(ids, self.count) == self.index
        return mine


def shard_numbers(ids: Ids, count: int) -> Numbers:
    """Number of the shard of each row (0 to count - 1), from its content and nothing else.

    Rows of equal content go to the same shard, where their answer is computed once. CRC-32 spreads the ids,
    whatever a subclass makes them of, and is the same on every machine.
    """
    contents = (row_id.rpartition(b"-")[0] or row_id for row_id in ids)
    numbers = (zlib.crc32(content) % count for content in contents)
    return np.fromiter(numbers, dtype=np.int32, count=len(ids))


def all_shards(count: int) -> tuple[Shard, ...]:
    """Return the shards of a run that is split into `count` parts."""
    return tuple(Shard(index, count) for index in range(count))
