"""Data files on this machine, read value for value into memory-mapped Arrow.

General-purpose readers guess types: they turn "007" into 7, "NA" into nothing and a date into a
timestamp, and they fail when a column holds a number in one row and text in another. Here a column
is either text, or, as soon as one value is not text, a JSON column that returns each value as it was
written. Rows are streamed, so memory grows with the longest row and not with the row count; only a
`.json` file, which is one single value, is read whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.data.formats.catalogue import FORMATS, kind_of, read_rows, table_format_of
from tasks.core.data.formats.format import Row, TableFormat
from tasks.core.data.formats.json_texts import write_json
from tasks.core.data.formats.limits import MOST_COLUMNS, check_width, named_paths
from tasks.core.data.formats.tables import EXACT_IN_A_FLOAT, table_batches
from tasks.core.data.preflight import check_disk_space
from tasks.core.errors import DataError, StorageError
from tasks.core.files import cache_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

_log = logging.getLogger(__name__)

_CACHE_FORMAT = "3"
_CACHE_DAYS = 30
_NOTES = b"tuneproof notes"
_REPEATED_SHOWN = 3
_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 16 << 20
_DISK_LEFT_BYTES = 256 << 20


_Note = tuple[int, str]
"""What a person should be told of the rows: the number of the file, and what follows behind its name."""


def open_files(paths: Sequence[Path], *, list_name: str | None = None) -> Dataset:
    """The rows of `paths`, one after another, as one memory-mapped dataset.

    `list_name` picks one list of a `.json` file that holds several.
    Raises DataError for a malformed or empty file, StorageError when the cache cannot be written.
    """
    import pyarrow as pa

    cached_path = cache_dir() / "data" / f"{_content_sha256(paths, list_name)[:32]}.arrow"
    try:
        if cached_path.exists():
            os.utime(cached_path)
            with suppress(pa.ArrowInvalid):  # damaged: written again below
                return _opened(cached_path, paths)
        _write_arrow(paths, list_name, cached_path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) in paths:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        raise StorageError(
            f"the dataset cache {cached_path.parent} cannot be written: {error}",
            "Free some disk space, or set TUNEPROOF_CACHE to a folder that can be written.",
        ) from error
    return _opened(cached_path, paths)


def _opened(cached_path: Path, paths: Sequence[Path]) -> Dataset:
    """The rows of a cached copy; what was noticed when it was written is told each time."""
    import pyarrow as pa
    from datasets import Dataset

    with pa.memory_map(str(cached_path)) as source, pa.ipc.open_stream(source) as stream:
        notes = json.loads((stream.schema.metadata or {}).get(_NOTES, b"[]"))
    for file_number, note in notes:
        _log.warning("%s%s", paths[file_number], note)
    return Dataset.from_file(str(cached_path))


def _with_notes(schema: pa.Schema, notes: Sequence[_Note]) -> pa.Schema:
    return schema.with_metadata({**(schema.metadata or {}), _NOTES: json.dumps(notes)}) if notes else schema


def _content_sha256(paths: Sequence[Path], list_name: str | None) -> str:
    """What the cached copy depends on: contents, not times, so that a change in place is always seen."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {list_name}".encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{kind_of(path)} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def _write_arrow(paths: Sequence[Path], list_name: str | None, cached_path: Path) -> None:
    """Write the rows as an Arrow stream, renamed into place when it is whole."""
    import pyarrow as pa

    notes: list[_Note] = []
    tables = [(path, known) for path in paths if (known := table_format_of(path)) is not None]
    if tables:
        if others := [path.name for path in paths if table_format_of(path) is None]:
            typed = " or ".join(one.name for one in FORMATS if isinstance(one, TableFormat))
            raise DataError(
                f"{named_paths(paths)} mixes {typed} with other kinds of files ({', '.join(others[:5])}).",
                "Keep one kind of file there, or name the files of one kind.",
            )
        features, batches = table_batches(tables)
    else:
        features, batches = _row_batches(paths, list_name, notes)
    cached_path.parent.mkdir(parents=True, exist_ok=True)
    _drop_old_copies(cached_path.parent)
    partial_path = cached_path.with_suffix(f".{secrets.token_hex(4)}.partial")
    schema, row_count = _with_notes(features.arrow_schema, notes), 0
    try:
        with pa.OSFile(str(partial_path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                check_disk_space(cached_path.parent, _DISK_LEFT_BYTES + batch.nbytes)
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
                row_count += batch.num_rows
        if row_count == 0:
            raise DataError(f"{named_paths(paths)} holds no rows.", "Check that this is the right file.")
        partial_path.replace(cached_path)
    finally:
        partial_path.unlink(missing_ok=True)


def _drop_old_copies(folder: Path) -> None:
    oldest_kept = time.time() - _CACHE_DAYS * 86400
    for path in folder.iterdir():
        with suppress(OSError):  # another process may be faster
            if path.stat().st_mtime < oldest_kept:
                path.unlink()


# --- formats without types


@dataclass
class _Kind:
    """What the values of one column have been so far."""

    has_gap: bool
    has_text: bool = False
    has_whole_float: bool = False
    has_other: bool = False

    def see(self, value: Any) -> None:
        if isinstance(value, str):
            self.has_text = True
        elif value is None:
            self.has_gap = True
        elif isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_IN_A_FLOAT:
            self.has_whole_float = True
        else:
            self.has_other = True

    @property
    def is_text(self) -> bool:
        """Whether all values are text."""
        return not (self.has_whole_float or self.has_other)

    @property
    def is_whole_with_gaps(self) -> bool:
        """Whether these are whole numbers that a table had to make floats of to mark its gaps (4.0, null)."""
        return self.has_gap and self.has_whole_float and not (self.has_text or self.has_other)


def _row_batches(
    paths: Sequence[Path], list_name: str | None, notes: list[_Note]
) -> tuple[Features, Iterator[pa.RecordBatch]]:
    """Two passes: the first finds malformed rows and which columns are text, the second converts.

    What a person should be told of the rows is added to `notes`.
    """
    from datasets import Features, Json, Value

    repeated = _Repeated()
    kinds: dict[str, _Kind] = {}
    row_count = 0
    for number, path in enumerate(paths):
        for row in read_rows(path, list_name, partial(repeated.add, number)):
            for name, value in row.items():
                kind = kinds.get(name)
                if kind is None:
                    kind = kinds[name] = _Kind(has_gap=row_count > 0)
                kind.see(value)
            if len(row) < len(kinds):
                for name in kinds.keys() - row.keys():
                    kinds[name].has_gap = True
            row_count += 1
            if len(kinds) > MOST_COLUMNS:
                check_width(len(kinds), f"{path}, row {row_count}")
    notes.extend(repeated.notes())
    features = Features({name: Value("string") if kind.is_text else Json() for name, kind in kinds.items()})

    def batches() -> Iterator[pa.RecordBatch]:
        rows: list[Row] = []
        size = 0
        for path in paths:
            for row in read_rows(path, list_name):
                rows.append(row)
                size += _weight(row)
                if len(rows) == _ROWS_PER_BATCH or size >= _BYTES_PER_BATCH:
                    yield _record_batch(rows, kinds, features)
                    rows, size = [], 0
        if rows:
            yield _record_batch(rows, kinds, features)

    return features, batches()


def _weight(value: Any) -> int:
    """About how many bytes a value holds, whatever it is nested in."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_weight, value.values()))
    return 8 + sum(map(_weight, value)) if isinstance(value, list) else 8


def _record_batch(rows: Sequence[Row], kinds: Mapping[str, _Kind], features: Features) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = []
    for name, kind in kinds.items():
        values = [row.get(name) for row in rows]
        if kind.is_whole_with_gaps:
            values = [None if value is None else int(value) for value in values]
        if not kind.is_text:
            values = [None if value is None else write_json(value) for value in values]
        column = pa.array(values, pa.string())
        arrays.append(column if kind.is_text else pa.ExtensionArray.from_storage(pa.json_(), column))
    return pa.RecordBatch.from_arrays(arrays, schema=features.arrow_schema)


class _Repeated:
    """Places where an object has a key twice: the first few, and how many there are."""

    def __init__(self) -> None:
        self._shown: list[_Note] = []
        self._count = 0

    def add(self, file_number: int, line: int | None, keys: Sequence[str]) -> None:
        self._count += 1
        if len(self._shown) < _REPEATED_SHOWN:
            at = "" if line is None else f", line {line}"
            is_or_are = "is" if len(keys) == 1 else "are"
            named = f"the key {', '.join(map(repr, keys))} {is_or_are} there more than once"
            self._shown.append((file_number, f"{at}: {named}; the last value is taken."))

    def notes(self) -> list[_Note]:
        more = self._count - len(self._shown)
        return (
            [*self._shown, (0, f": {more} more rows of the data have a key more than once.")]
            if more
            else self._shown
        )
