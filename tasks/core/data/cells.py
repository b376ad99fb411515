"""The values of a dataset's cells as Python has them: exact numbers, names of labels, no column but those wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import orjson

from tasks.core.data.formats.json_texts import read_json
from tasks.core.data.formats.tables import python_values

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_ROWS_PER_READ = 1000
_BYTES_PER_READ = 64 << 20


def read_cells(
    rows: Dataset | Sequence[Mapping[str, Any]], columns: Sequence[str | None]
) -> Iterator[tuple[Any, ...]]:
    """The values of each row in these columns, None where a column is None; other columns are not read."""
    if not hasattr(rows, "select_columns"):
        for row in rows:
            yield tuple(row.get(name) if name is not None else None for name in columns)
        return
    wanted = list(dict.fromkeys(name for name in columns if name is not None))
    features: Mapping[str, Any] = getattr(rows, "features", {})
    narrow = rows.select_columns(wanted)
    tables = narrow.with_format("arrow").iter(batch_size=_ROWS_PER_READ)
    for table in chain.from_iterable(map(_in_parts, tables)):
        values = {name: _values(table.column(name), features[name]) for name in wanted}
        nothing = [None] * table.num_rows
        yield from zip(*(nothing if name is None else values[name] for name in columns), strict=True)


def _in_parts(table: pa.Table) -> Iterator[pa.Table]:
    """The table in parts that fit into memory as values of Python, halved until they do; a row is not parted."""
    if table.num_rows <= 1 or table.nbytes <= _BYTES_PER_READ:
        yield table
        return
    middle = table.num_rows // 2
    yield from _in_parts(table.slice(0, middle))
    yield from _in_parts(table.slice(middle))


def _values(column: pa.ChunkedArray, feature: Any) -> list[Any]:
    import pyarrow as pa

    if isinstance(column.type, pa.JsonType):
        texts = column.cast(pa.string()).to_pylist()
        return [None if text is None else _json_value(text) for text in texts]
    values = python_values(column)
    return [_named(value, feature) for value in values] if _has_labels(feature) else values


def _json_value(text: str) -> Any:
    try:
        return read_json(text.encode("utf-8", "replace"))
    except (orjson.JSONDecodeError, RecursionError):
        return text


def _has_labels(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_has_labels, feature.values()))
    inner = getattr(feature, "feature", None)
    return hasattr(feature, "int2str") or (inner is not None and _has_labels(inner))


def _named(value: Any, feature: Any) -> Any:
    """The value with the names of labels in place of their numbers."""
    if value is None:
        return None
    if hasattr(feature, "int2str"):
        names: Sequence[str] = feature.names or ()
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    if isinstance(feature, Mapping):
        return {name: _named(item, feature.get(name)) for name, item in value.items()}
    inner = getattr(feature, "feature", None)
    return [_named(item, inner) for item in value] if inner is not None and isinstance(value, list) else value
