"""What a data format is: the endings of its files' names, and how such a file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]
TellRepeated = Callable[[int | None, Sequence[str]], None]
"""Takes a line (None where the file is one value) and the keys that one object there has more than once."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Files whose values have no types but their own; they may be packed (`rows.csv.gz`).

    `rows` takes the path, the name of the wanted list where a file holds several, and whom to tell of keys that an
    object has twice, if anybody. It gives each value as it is written, and raises DataError with the line.
    """

    suffixes: tuple[str, ...]
    rows: Callable[[Path, str | None, TellRepeated | None], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class TableFormat:
    """Files whose columns have Arrow types. Both functions may raise what Arrow raises.

    `name` is for messages. `batches` gives the rows of the named columns, at most so many at once.
    """

    name: str
    suffixes: tuple[str, ...]
    schema: Callable[[Path], pa.Schema]
    batches: Callable[[Path, Sequence[str], int], Iterator[pa.RecordBatch]]


DataFormat = RowFormat | TableFormat
