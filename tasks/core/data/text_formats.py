"""Readers of text files: JSON Lines, JSON and CSV, one row after another, each value as it is written.

A malformed row ends the reading with an error that names the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from tasks.core.errors import DataError

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_EXCERPT_CHARACTERS = 80
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read `path` (".csv" for "rows.csv.gz"), or None for no data file."""
    name = path.name.lower().removesuffix(".gz")
    suffix = next((known for known in SUFFIXES if name.endswith(known)), None)
    return None if suffix == ".parquet" and path.suffix.lower() == ".gz" else suffix


def read_rows(path: Path, list_name: str | None) -> Iterator[Row]:
    """The rows of one text file; `list_name` picks one list of a `.json` file that holds several."""
    kind = kind_of(path)
    try:
        if kind in (".csv", ".tsv"):
            yield from _read_csv(path)
        elif _is_one_json_value(path, kind):
            yield from _read_json(path, list_name)
        else:
            yield from _read_json_lines(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged compressed file ({error}).", "Compress or copy the file again."
        ) from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _is_one_json_value(path: Path, kind: str | None) -> bool:
    """Exports often name JSON Lines `.json` and the other way round, so the content decides."""
    with _open(path) as file:
        lines = (line for line in file if line.strip())
        first = next(lines, b"").removeprefix(_BYTE_ORDER_MARK).strip()
        if first.startswith(b"["):
            return True
        if kind != ".json":
            return False
        try:
            orjson.loads(first)
        except orjson.JSONDecodeError:
            return True
        return next(lines, None) is None


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.isspace() or not line:
                continue
            row = _parse(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: not a JSON object but {_named_type(row)}: {_excerpt(line)}",
                    'Each line must be one object, such as {"question": "…", "answer": "…"}.',
                )
            yield row


def _read_json(path: Path, list_name: str | None) -> Sequence[Row]:
    """A list of objects, or an object with one list of objects (or several: `list_name` picks one)."""
    with _open(path) as file:
        value = _parse(file.read().removeprefix(_BYTE_ORDER_MARK), str(path))
    if isinstance(value, dict):
        lists = {name: item for name, item in value.items() if isinstance(item, list)}
        if len(lists) == 1:
            value = next(iter(lists.values()))
        elif list_name in lists:
            value = lists[list_name]
        elif lists:
            raise DataError(
                f"{path} holds {len(lists)} lists ({', '.join(lists)}), and none is called {list_name!r}.",
                "Ask for one of them as the split, or keep one list of rows in the file.",
            )
    if not isinstance(value, list):
        raise DataError(f"{path} holds {_named_type(value)}, not a list of objects.", _JSON_SHAPES)
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, item {number} of the list is {_named_type(row)}, not an object.", _JSON_SHAPES
            )
    return value


_JSON_SHAPES = (
    'Use a list of objects, such as [{"question": "…", "answer": "…"}], or an object with one such list.'
)


def _parse(text: bytes, where: str) -> Any:
    """Parse JSON; what only Python's own reader takes (NaN, half surrogate pairs, huge integers) passes too."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as strict_error:
        try:
            return _repaired(json.loads(text.decode("utf-8"), parse_constant=lambda _: None))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 text ({error.reason}).", "Save the file as UTF-8."
            ) from error
        except (ValueError, RecursionError):
            raise _not_json(text, where, strict_error) from None


def _repaired(value: Any) -> Any:
    """Half surrogate pairs, which no UTF-8 text can hold, become question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    if isinstance(value, dict):
        return {_repaired(name): _repaired(item) for name, item in value.items()}
    return value


def _not_json(text: bytes, where: str, error: json.JSONDecodeError) -> DataError:
    if not text.strip():
        return DataError(f"{where} is empty.", "Check that this is the right file.")
    lines = text.splitlines()
    place = where if ", line" in where else f"{where}, line {error.lineno}"
    excerpt = _excerpt(lines[min(error.lineno, len(lines)) - 1])
    return DataError(f"{place}: not valid JSON ({error.msg}): {excerpt}", "Correct or remove this line.")


def _read_csv(path: Path) -> Iterator[Row]:
    """Every cell as the text that is written there; the delimiter is a comma unless the header has none."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            header_line = text.readline()
            text.seek(0)
            delimiter = next((mark for mark in (",", "\t", ";") if mark in header_line), ",")
            reader = csv.reader(text, delimiter="\t" if kind_of(path) == ".tsv" else delimiter, strict=True)
            header = next(reader, None)
            if header is None:
                return
            names = [name.strip() or f"column {number}" for number, name in enumerate(header, start=1)]
            _refuse_repeated(names, path)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(names)}: "
                        f"{_excerpt(delimiter.join(cells).encode())}",
                        "Put quotes around cells that hold a comma, a quote or a line break.",
                    )
                yield dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}.", "Check the quotes near this line."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).",
                'Save the file as UTF-8 (in a spreadsheet: "CSV UTF-8").',
            ) from error


def _refuse_repeated(names: Sequence[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"{path}: the header has {', '.join(map(repr, repeated))} more than once.", "Rename one of them."
        )


def _excerpt(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= _EXCERPT_CHARACTERS else text[:_EXCERPT_CHARACTERS] + "…"


def _named_type(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }.get(type(value), "a number")
