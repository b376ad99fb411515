"""Arrow files, as files and as streams (what the datasets library writes), mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.data.formats.format import TableFormat

if TYPE_CHECKING:
    import pyarrow as pa


def _reader(path: Path) -> Any:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _schema(path: Path) -> pa.Schema:
    return _reader(path).schema


def _batches(path: Path, names: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
    reader = _reader(path)
    whole = (
        (reader.get_batch(number) for number in range(reader.num_record_batches))
        if hasattr(reader, "num_record_batches")
        else reader
    )
    for batch in whole:
        for start in range(0, batch.num_rows, most):
            yield batch.slice(start, most).select(list(names))


ARROW = TableFormat("Arrow", (".arrow",), _schema, _batches)
