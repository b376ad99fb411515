"""All rows of a run in their order: read once, found by their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import numpy as np

from tasks.core.errors import DataError
from tasks.core.records import Example
from tasks.core.runs.kept_rows import KeptExamples
from tasks.core.runs.ledger import Ids

LONGEST_ID_BYTES = 200
"""All ids are in memory at the width of the longest, so one very long id would cost that much for every row."""
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class RunRows:
    """The rows to answer. `examples()` gives them from the start, always in the same order.

    Where they are more than memory should hold they do not travel to other processes: see `are_here`.
    """

    examples: KeptExamples
    ids: Ids
    rows_sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def are_here(self) -> bool:
        """Whether the examples can be read in this process; ids and digest always are."""
        return self.examples.are_here

    def only(self, positions: Container[int]) -> RunRows:
        """Return the rows at these positions, as rows of a run of their own; the ids stay."""
        return index_rows(
            lambda: (example for place, example in enumerate(self.examples()) if place in positions)
        )


def index_rows(examples: Callable[[], Iterable[Example]]) -> RunRows:
    """Read all examples, once, and keep them.

    `rows_sha256` is over the ids in order; ids are content hashes, so it changes with any row and any move.
    Raises DataError when an id is empty, longer than `LONGEST_ID_BYTES`, or there twice.
    """
    digest = hashlib.sha256()
    full: list[Ids] = []
    chunk: list[bytes] = []
    kept = KeptExamples()
    for example in examples():
        encoded = example.id.encode()
        if not 0 < len(encoded) <= LONGEST_ID_BYTES:
            row = len(full) * _CHUNK_ROWS + len(chunk) + 1
            raise DataError(
                f"the id of row {row} has {len(encoded)} bytes: {example.id[:60]!r}",
                f"give ids of 1 to {LONGEST_ID_BYTES} bytes, for example a hash of what is too long",
            )
        digest.update(encoded)
        digest.update(b"\n")
        chunk.append(encoded)
        kept.add(example)
        if len(chunk) == _CHUNK_ROWS:
            full.append(np.array(chunk, dtype=np.bytes_))
            chunk = []
    full.append(np.array(chunk, dtype=np.bytes_))
    ids: Ids = np.concatenate(full)
    _refuse_repeated(ids)
    return RunRows(kept, ids, digest.hexdigest())


def _refuse_repeated(ids: Ids) -> None:
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise DataError(
            f"{len(repeated)} rows have the id of another row, for example {repeated[0].decode()!r}",
            "give every row an id of its own: answers are kept by id, so these would share one answer",
        )
