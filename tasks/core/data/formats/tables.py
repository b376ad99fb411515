"""Files whose columns have types, read so that no column's type and no difference between files stops the reading.

A column keeps its Arrow type where the datasets library has that type and all files agree. Otherwise it becomes a
JSON column, which gives each value as it is: a map as an object, a union's value, a number here and a text there.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.data.formats.format import TableFormat
from tasks.core.data.formats.json_texts import decimal_text, write_json
from tasks.core.data.formats.limits import check_width, named_paths
from tasks.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

_log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1000
EXACT_IN_A_FLOAT = 2.0**53
"""Whole numbers up to this are what they were before they became floats."""


def table_batches(
    tables: Sequence[tuple[Path, TableFormat]],
) -> tuple[Features, Iterator[pa.RecordBatch]]:
    """The columns of all files together, and their rows; a column that a file lacks is empty there.

    Raises DataError for a file that is damaged.
    """
    import pyarrow as pa

    try:
        files = [_TableFile(path, one) for path, one in tables]
        names = list(dict.fromkeys(name for file in files for name in file.types))
        schema = pa.schema(
            [
                pa.field(name, _common_type([file.types[name] for file in files if name in file.types]))
                for name in names
            ]
        )
        features = _features(schema, files)
    except (pa.ArrowException, OSError) as error:
        where = named_paths([path for path, _ in tables])
        raise DataError(f"{where}: {error}", "Write the file again.") from error

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            try:
                for batch in file.batches():
                    yield file.with_schema(batch, features.arrow_schema)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file.path}: {error}", "Write the file again.") from error

    return features, batches()


@dataclass
class _TableFile:
    """One file; `types` are the columns' Arrow types as they are to be read."""

    path: Path
    format: TableFormat
    types: dict[str, pa.DataType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self._readable_names()
        whole = self._whole_numbers_with_gaps(names)
        import pyarrow as pa

        self.types = {name: pa.int64() if name in whole else self._schema.field(name).type for name in names}

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """The names of the labels of each column that holds labels by number."""
        try:
            info = json.loads((self._schema.metadata or {}).get(b"huggingface", b"{}"))
            features: Mapping[str, Any] = info["info"]["features"]
            return {
                name: item["names"] for name, item in features.items() if item.get("_type") == "ClassLabel"
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            return {}

    @property
    def metadata(self) -> Mapping[bytes, bytes] | None:
        return self._schema.metadata  # type: ignore[no-any-return]

    @cached_property
    def _schema(self) -> pa.Schema:
        return self.format.schema(self.path)

    def batches(self, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of these columns, or of all that can be read."""
        wanted = list(self.types if names is None else names)
        return self.format.batches(self.path, wanted, _ROWS_PER_BATCH)

    def _readable_names(self) -> list[str]:
        import pyarrow as pa

        names = list(self._schema.names)
        check_width(len(names), self.path)
        if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
            raise DataError(
                f"{self.path} has the column {repeated[0]!r} more than once.", "Rename one of them."
            )
        try:
            next(self.batches(names), None)
            return names
        except pa.ArrowNotImplementedError:
            return [name for name in names if self._can_read(name)]

    def _can_read(self, name: str) -> bool:
        import pyarrow as pa

        try:
            next(self.batches([name]), None)
        except pa.ArrowException as error:
            _log.warning("The column %r of %s cannot be read and is left out: %s", name, self.path, error)
            return False
        return True

    def _whole_numbers_with_gaps(self, names: Sequence[str]) -> set[str]:
        """Columns of floats that are whole numbers but for gaps: whole numbers, before a table had to mark a gap."""
        import pyarrow as pa

        candidates = [name for name in names if pa.types.is_floating(self._schema.field(name).type)]
        has_gap: set[str] = set()
        for batch in self.batches(candidates) if candidates else ():
            for name in tuple(candidates):
                kind = gaps_and_whole_numbers(batch.column(name))
                if kind is None:
                    candidates.remove(name)
                elif kind:
                    has_gap.add(name)
        return has_gap & set(candidates)

    def with_schema(self, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        """The batch with all columns of `schema`."""
        import pyarrow as pa

        columns = [
            self._as_type(batch.column(item.name), item)
            if item.name in batch.schema.names
            else pa.nulls(batch.num_rows, item.type)
            for item in schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _as_type(self, column: pa.Array, wanted: pa.Field) -> pa.Array:
        import pyarrow as pa

        if column.type == wanted.type:
            return column
        if isinstance(wanted.type, pa.JsonType):
            return pa.ExtensionArray.from_storage(wanted.type, pa.array(_json_cells(column), pa.string()))
        if pa.types.is_floating(column.type) and pa.types.is_integer(wanted.type):
            return whole_numbers(column).cast(wanted.type)
        if wanted.name in self.labels and pa.types.is_string(wanted.type):
            names = self.labels[wanted.name]
            numbers = column.to_pylist()
            return pa.array(
                [names[n] if n is not None and 0 <= n < len(names) else None for n in numbers], pa.string()
            )
        return column.cast(wanted.type)


def gaps_and_whole_numbers(column: pa.Array | pa.ChunkedArray) -> bool | None:
    """Whether a float column has gaps (null, NaN); None where a value is no whole number, or is too large to be one."""
    import pyarrow.compute as pc

    values = pc.drop_null(column).cast("float64")
    numbers = values.filter(pc.invert(pc.is_nan(values)))
    fits = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less_equal(pc.abs(numbers), EXACT_IN_A_FLOAT))
    if not pc.all(fits, min_count=0).as_py():
        return None
    return len(numbers) < len(column)


def whole_numbers(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A float column of whole numbers and gaps as 64-bit integers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.cast("float64")
    return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values).cast("int64")


# --- types


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    """The type that holds the values of all files as they are; JSON where there is none."""
    import pyarrow as pa

    plain = [kind for kind in map(_plain_type, types) if not pa.types.is_null(kind)] or [pa.null()]
    if any(kind != plain[0] for kind in plain):
        alike = (pa.types.is_integer, pa.types.is_floating, _is_text)
        if not any(all(map(is_alike, plain)) for is_alike in alike):
            return pa.json_()
        try:
            schemas = [pa.schema([pa.field("c", kind)]) for kind in plain]
            plain = [pa.unify_schemas(schemas, promote_options="permissive").field(0).type]
        except pa.ArrowException:
            return pa.json_()
    return _known_type(plain[0])


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Dictionary-encoded values (pandas' categories) as the values themselves, views as what they show."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _known_type(kind: pa.DataType) -> pa.DataType:
    """The type as the datasets library writes it; JSON for one that it does not have."""
    import pyarrow as pa
    from datasets import Features

    try:
        known = Features.from_arrow_schema(pa.schema([pa.field("c", kind)])).arrow_schema.field(0).type
        if known != kind:
            pa.array([], kind).cast(known)
    except Exception:  # an unknown type ends as ValueError, TypeError, KeyError or an error of Arrow's
        return pa.json_()
    return known


def _features(schema: pa.Schema, files: Sequence[_TableFile]) -> Features:
    """Features with what the files say of them, such as the names of labels."""
    import pyarrow as pa
    from datasets import Features

    for name in {name for file in files for name in file.labels if name in schema.names}:
        named = [file.labels.get(name) for file in files if name in file.types]
        if any(names != named[0] for names in named):  # the same number means another label in each file
            kind = pa.string() if all(names is not None for names in named) else pa.json_()
            schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    try:
        metadata = next((file.metadata for file in files if file.metadata), None)
        return Features.from_arrow_schema(schema.with_metadata(metadata))
    except Exception:  # metadata of another version of the library, or damaged
        return Features.from_arrow_schema(schema.remove_metadata())


def _json_cells(column: pa.Array) -> list[str | None]:
    return [None if value is None else write_json(_whole_text(value)) for value in python_values(column)]


def _whole_text(value: Any) -> Any:
    return decimal_text(value) if isinstance(value, Decimal) and value.is_finite() else value


def python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values as Python has them, maps as dicts; as text, or None, what Python cannot hold (the year 20000)."""
    import pyarrow as pa

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a key that a map has twice, the last one is taken
            values: list[Any] = column.to_pylist(maps_as_pydicts="lossy")
        return values
    except Exception:  # OverflowError, ValueError, ArrowInvalid, missing time zones: by type of the column
        try:
            texts: list[Any] = column.cast(pa.string()).to_pylist()
            return texts
        except pa.ArrowException:
            return [None] * len(column)
