"""The formats that can be read, by the endings of files' names."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from tasks.core.data.formats.arrow_files import ARROW
from tasks.core.data.formats.csv_files import CSV, TSV
from tasks.core.data.formats.format import DataFormat, Row, TableFormat, TellRepeated
from tasks.core.data.formats.json_files import JSON, JSON_LINES
from tasks.core.data.formats.parquet_files import PARQUET
from tasks.core.errors import DataError

FORMATS: tuple[DataFormat, ...] = (
    JSON_LINES,
    JSON,
    CSV,
    TSV,
    PARQUET,
    ARROW,
)


def suffixes() -> tuple[str, ...]:
    """All endings."""
    return tuple(suffix for one in FORMATS for suffix in one.suffixes)


def format_of(path: Path) -> tuple[DataFormat, str] | None:
    """How to read `path`, and the ending that says so (".csv" for "rows.csv.gz"); None for no data file."""
    name = path.name.lower().removesuffix(".gz")
    for one in FORMATS:
        for suffix in one.suffixes:
            if name.endswith(suffix):
                is_packed = path.suffix.lower() == ".gz"
                return None if is_packed and isinstance(one, TableFormat) else (one, suffix)
    return None


def kind_of(path: Path) -> str | None:
    """The ending alone."""
    found = format_of(path)
    return None if found is None else found[1]


def table_format_of(path: Path) -> TableFormat | None:
    """How to read a file whose columns have types; None for another."""
    found = format_of(path)
    return found[0] if found is not None and isinstance(found[0], TableFormat) else None


def read_rows(path: Path, list_name: str | None, tell_repeated: TellRepeated | None = None) -> Iterator[Row]:
    """The rows of one file of a row format; one without a known ending is read as JSON Lines.

    `list_name` picks one list of a `.json` file that holds several. A key that an object has twice has its last
    value; `tell_repeated` is told of it. Raises DataError.
    """
    found = format_of(path)
    known = JSON_LINES if found is None or isinstance(found[0], TableFormat) else found[0]
    try:
        yield from known.rows(path, list_name, tell_repeated)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged compressed file ({error}).", "Compress or copy the file again."
        ) from error
