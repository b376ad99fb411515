"""All rows of a run in their order: ids in memory, everything else read again when needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tasks.core.generation.ledger import Ids
from tasks.core.records import Example

ID_BYTES = 28
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class RunRows:
    """The rows to answer. `examples()` reads them again from the start, always in the same order."""

    examples: Callable[[], Iterator[Example]]
    ids: Ids
    rows_sha256: str

    def __len__(self) -> int:
        return len(self.ids)


def index_rows(examples: Callable[[], Iterable[Example]]) -> RunRows:
    """Read all examples once and keep what a run needs of each: its id.

    `rows_sha256` is over the ids in order; ids are content hashes, so it changes with any row and any move.
    """
    digest = hashlib.sha256()
    full: list[Ids] = []
    chunk: list[bytes] = []
    for example in examples():
        encoded = example.id.encode()
        digest.update(encoded)
        digest.update(b"\n")
        chunk.append(encoded)
        if len(chunk) == _CHUNK_ROWS:
            full.append(np.array(chunk, dtype=f"S{ID_BYTES}"))
            chunk = []
    full.append(np.array(chunk, dtype=f"S{ID_BYTES}"))
    return RunRows(lambda: iter(examples()), np.concatenate(full), digest.hexdigest())
