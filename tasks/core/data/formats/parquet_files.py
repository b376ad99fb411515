"""Parquet files. One of a kilobyte may hold one long text a million times, so few of its rows are read at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.data.formats.format import TableFormat
from tasks.core.data.formats.limits import LONGEST_LINE_BYTES, size_text
from tasks.core.data.preflight import check_disk_space
from tasks.core.errors import DataError
from tasks.core.files import cache_dir

if TYPE_CHECKING:
    import pyarrow as pa

_BYTES_AT_ONCE = 64 << 20


def _schema(path: Path) -> pa.Schema:
    import pyarrow.parquet as pq

    return pq.read_schema(path)


def _batches(path: Path, names: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    rows = rows_at_once(path, most)
    yield from pq.ParquetFile(path).iter_batches(batch_size=rows, columns=list(names))


PARQUET = TableFormat("Parquet", (".parquet",), _schema, _batches)


def rows_at_once(path: Path, most: int) -> int:
    """How many rows, up to `most`, may be read at once.

    Raises DataError for a row that is too large to be read, StorageError where the cache has no room for all.
    Texts are looked at as they are stored, each once and its places by number, so that nothing grows here.
    """
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    columns = [
        group.column(number)
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for number in range(group.num_columns)
    ]
    stored = max((_bytes_per_value(column) for column in columns), default=0)
    count = _fitting(stored * most, most)
    repeated = {
        column.path_in_schema
        for column in columns
        if column.physical_type == "BYTE_ARRAY"
        and column.has_dictionary_page
        and column.total_uncompressed_size * min(most, column.num_values) > _BYTES_AT_ONCE
    }
    if repeated:
        roots = sorted({name.split(".")[0] for name in repeated} & set(pq.read_schema(path).names))
        file = pq.ParquetFile(path, read_dictionary=sorted(repeated))
        largest, total, checked = 0, 0, 0
        for batch in file.iter_batches(batch_size=count, columns=roots):
            size = sum(_decoded_bytes(column) for column in batch.columns)
            total += size
            if total > 2 * checked + _BYTES_AT_ONCE:  # while it is counted, so that the counting ends
                check_disk_space(cache_dir(), checked := total)
            largest = max(largest, size * most // max(1, batch.num_rows))
            if size > _BYTES_AT_ONCE:
                _refuse_large_rows(path, batch)
        count = min(count, _fitting(largest, most))
    return count


def _fitting(size: int, rows: int) -> int:
    return rows if size <= _BYTES_AT_ONCE else max(1, rows * _BYTES_AT_ONCE // size)


def _bytes_per_value(column: Any) -> int:
    return int(column.total_uncompressed_size) // max(1, int(column.num_values))


def _refuse_large_rows(path: Path, batch: Any) -> None:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for place in range(batch.num_rows):
            size = _decoded_bytes(column.slice(place, 1))
            if size > LONGEST_LINE_BYTES:
                raise DataError(
                    f"{path}: a row of the column {name!r} has {size_text(size)}, more than "
                    f"{size_text(LONGEST_LINE_BYTES)}, the limit for one row.",
                    "Split the row, or remove it.",
                )


def _decoded_bytes(column: Any) -> int:
    """Bytes of a column's texts when each stands in its place."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return sum(
        int(pc.sum(pc.take(pc.binary_length(part.dictionary).cast(pa.int64()), part.indices)).as_py() or 0)
        for part in _dictionaries(column)
    )


def _dictionaries(column: Any) -> Iterator[Any]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        if pa.types.is_string(kind.value_type) or pa.types.is_binary(kind.value_type):
            yield column
    elif pa.types.is_struct(kind):
        for field in column.flatten():
            yield from _dictionaries(field)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        for inner in [column.flatten()] if not pa.types.is_map(kind) else [column.keys, column.items]:
            yield from _dictionaries(inner)
