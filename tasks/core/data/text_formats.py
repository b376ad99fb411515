"""Readers of text files: JSON Lines, JSON and CSV, one row after another, each value as it is written.

A malformed row ends the reading with an error that names the file and the line.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import orjson

from tasks.core.data.formats.csv_files import read_csv
from tasks.core.data.formats.json_texts import TOO_DEEP, read_json, repeated_keys
from tasks.core.data.formats.limits import UnpackedFile, bounded_lines, read_whole
from tasks.core.errors import DataError

Row = Mapping[str, Any]
TellRepeated = Callable[[int | None, Sequence[str]], None]
"""Takes a line (None where the file is one value) and the keys that one object there has more than once."""

TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TABLE_SUFFIXES)
_EXCERPT_CHARACTERS = 80
_START_BYTES = 1 << 16
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_WIDE_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read `path` (".csv" for "rows.csv.gz"), or None for no data file."""
    name = path.name.lower().removesuffix(".gz")
    suffix = next((known for known in SUFFIXES if name.endswith(known)), None)
    return None if suffix in TABLE_SUFFIXES and path.suffix.lower() == ".gz" else suffix


def read_rows(path: Path, list_name: str | None, tell_repeated: TellRepeated | None = None) -> Iterator[Row]:
    """The rows of one text file; `list_name` picks one list of a `.json` file that holds several.

    A key that an object has twice has its last value; `tell_repeated` is told of it. Raises DataError.
    """
    kind = kind_of(path)
    try:
        if kind in (".csv", ".tsv"):
            yield from read_csv(_open(path), path, is_tabbed=kind == ".tsv")
        elif _is_one_json_value(path, kind):
            yield from _read_json(path, list_name, tell_repeated)
        else:
            yield from _read_json_lines(path, tell_repeated)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged compressed file ({error}).", "Compress or copy the file again."
        ) from error


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked; what is marked as UTF-16 or UTF-32 comes as UTF-8."""
    is_packed = path.suffix.lower() == ".gz"
    file = cast(IO[bytes], io.BufferedReader(UnpackedFile(path)) if is_packed else path.open("rb"))
    start = file.read(4)
    file.seek(0)
    encoding = next((name for mark, name in _WIDE_MARKS.items() if start.startswith(mark)), None)
    if encoding is None and start.count(0) >= 2:
        file.close()
        raise DataError(
            f"{path}: not UTF-8 text (it looks like UTF-16 without a mark).", "Save the file as UTF-8."
        )
    return file if encoding is None else _recoded(file, encoding, path)


def _recoded(file: IO[bytes], encoding: str, path: Path) -> IO[bytes]:
    """The same text as UTF-8, in a temporary file, so that memory does not grow with it."""
    recoded = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
        try:
            while part := text.read(1 << 20):
                recoded.write(part.encode("utf-8", "replace"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: marked as {encoding.upper()}, but not text of that kind ({error.reason}).",
                "Save the file as UTF-8.",
            ) from error
    recoded.seek(0)
    return recoded


def _is_one_json_value(path: Path, kind: str | None) -> bool:
    """Exports often name JSON Lines `.json` and the other way round, so the content decides."""
    with _open(path) as file:
        if file.read(_START_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
            return True
        if kind != ".json":
            return False
        file.seek(0)
        lines = (line for line in bounded_lines(file, path) if line.strip())
        try:
            first = next(lines, b"").removeprefix(_BYTE_ORDER_MARK).strip()
        except DataError:  # too long for a line of many
            return True
        try:
            orjson.loads(first)
        except orjson.JSONDecodeError:
            return True
        return next(lines, None) is None


def _read_json_lines(path: Path, tell_repeated: TellRepeated | None) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
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
            if tell_repeated is not None and (keys := repeated_keys(line, row)):
                tell_repeated(number, keys)
            yield row


def _read_json(path: Path, list_name: str | None, tell_repeated: TellRepeated | None) -> Sequence[Row]:
    """A list of objects, or an object with one list of objects (or several: `list_name` picks one)."""
    with _open(path) as file:
        text = read_whole(file, path).removeprefix(_BYTE_ORDER_MARK)
    value = _parse(text, str(path))
    if tell_repeated is not None and (keys := repeated_keys(text, value)):
        tell_repeated(None, keys)
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
    try:
        return read_json(text)
    except orjson.JSONDecodeError as error:
        raise _not_json(text, where, error) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}).", "Save the file as UTF-8.") from error


def _not_json(text: bytes, where: str, error: json.JSONDecodeError) -> DataError:
    if not text.strip():
        return DataError(f"{where} is empty.", "Check that this is the right file.")
    if error.msg == TOO_DEEP:
        return DataError(f"{where}: {error.msg}: {_excerpt(text[:1000])}", "Make it flatter, or remove it.")
    lines = text.split(b"\n")  # as the parser counts them
    place = where if ", line" in where else f"{where}, line {error.lineno}"
    excerpt = _excerpt(lines[min(error.lineno, len(lines)) - 1])
    return DataError(f"{place}: not valid JSON ({error.msg}): {excerpt}", "Correct or remove this line.")


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
