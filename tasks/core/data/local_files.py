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
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from tasks.core.data.text_formats import Row, kind_of, read_rows
from tasks.core.errors import DataError, StorageError
from tasks.core.files import cache_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

_CACHE_FORMAT = "1"
_CACHE_DAYS = 30
_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 16 << 20


def open_files(paths: Sequence[Path], *, list_name: str | None = None) -> Dataset:
    """The rows of `paths`, one after another, as one memory-mapped dataset.

    `list_name` picks one list of a `.json` file that holds several.
    Raises DataError for a malformed or empty file, StorageError when the cache cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset

    cached_path = cache_dir() / "data" / f"{_content_sha256(paths, list_name)[:32]}.arrow"
    try:
        if cached_path.exists():
            os.utime(cached_path)
            with suppress(pa.ArrowInvalid):  # damaged: written again below
                return Dataset.from_file(str(cached_path))
        _write_arrow(paths, list_name, cached_path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) in paths:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        raise StorageError(
            f"the dataset cache {cached_path.parent} cannot be written: {error}",
            "Free some disk space, or set TUNEPROOF_CACHE to a folder that can be written.",
        ) from error
    return Dataset.from_file(str(cached_path))


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

    if any(kind_of(path) == ".parquet" for path in paths):
        features, batches = _parquet_batches(paths)
    else:
        features, batches = _row_batches(paths, list_name)
    cached_path.parent.mkdir(parents=True, exist_ok=True)
    _drop_old_copies(cached_path.parent)
    partial_path = cached_path.with_suffix(f".{secrets.token_hex(4)}.partial")
    schema, row_count = features.arrow_schema, 0
    try:
        with pa.OSFile(str(partial_path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                row_count += batch.num_rows
        if row_count == 0:
            raise DataError(f"{_names(paths)} holds no rows.", "Check that this is the right file.")
        partial_path.replace(cached_path)
    finally:
        partial_path.unlink(missing_ok=True)


def _drop_old_copies(folder: Path) -> None:
    oldest_kept = time.time() - _CACHE_DAYS * 86400
    for path in folder.iterdir():
        with suppress(OSError):  # another process may be faster
            if path.stat().st_mtime < oldest_kept:
                path.unlink()


# --- text formats: JSON Lines, JSON, CSV


def _row_batches(paths: Sequence[Path], list_name: str | None) -> tuple[Features, Iterator[pa.RecordBatch]]:
    """Two passes: the first finds malformed rows and which columns are text, the second converts."""
    from datasets import Features, Json, Value

    is_text: dict[str, bool] = {}
    for path in paths:
        for row in read_rows(path, list_name):
            for name, value in row.items():
                is_text[name] = is_text.get(name, True) and (value is None or isinstance(value, str))
    features = Features({name: Value("string") if text else Json() for name, text in is_text.items()})

    def batches() -> Iterator[pa.RecordBatch]:
        rows: list[Row] = []
        size = 0
        for path in paths:
            for row in read_rows(path, list_name):
                rows.append(row)
                size += sum(len(value) for value in row.values() if isinstance(value, (str, list)))
                if len(rows) == _ROWS_PER_BATCH or size >= _BYTES_PER_BATCH:
                    yield _record_batch(rows, is_text, features)
                    rows, size = [], 0
        if rows:
            yield _record_batch(rows, is_text, features)

    return features, batches()


def _record_batch(rows: Sequence[Row], is_text: Mapping[str, bool], features: Features) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = []
    for name, text in is_text.items():
        values = [row.get(name) for row in rows]
        if not text:
            values = [None if value is None else _json_text(value) for value in values]
        column = pa.array(values, pa.string())
        arrays.append(column if text else pa.ExtensionArray.from_storage(pa.json_(), column))
    return pa.RecordBatch.from_arrays(arrays, schema=features.arrow_schema)


def _json_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(value)


# --- Parquet


def _parquet_batches(paths: Sequence[Path]) -> tuple[Features, Iterator[pa.RecordBatch]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    if others := [path.name for path in paths if kind_of(path) != ".parquet"]:
        raise DataError(
            f"{paths[0].parent} mixes Parquet with other kinds of files ({', '.join(others[:5])}).",
            "Keep one kind of file in the folder, or name one file.",
        )
    try:
        schemas = [_plain_types(pq.read_schema(path)) for path in paths]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{_names(paths)}: {error}", "Write the Parquet file again.") from error
    features = Features.from_arrow_schema(schema)

    def batches() -> Iterator[pa.RecordBatch]:
        for path in paths:
            try:
                for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_BATCH):
                    yield _with_schema(batch, features.arrow_schema)
            except pa.ArrowException as error:
                raise DataError(f"{path}: {error}", "Write the Parquet file again.") from error

    return features, batches()


def _plain_types(schema: pa.Schema) -> pa.Schema:
    """Dictionary-encoded columns (pandas' categories) become columns of their values."""
    import pyarrow as pa

    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
    ]
    return pa.schema(fields, metadata=schema.metadata)


def _with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _names(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
