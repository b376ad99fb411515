"""JSON Lines and JSON, one row after another, each value as it is written.

A malformed row ends the reading with an error that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tasks.core.data.formats.format import Row, RowFormat, TellRepeated
from tasks.core.data.formats.json_texts import TOO_DEEP, read_json, repeated_keys
from tasks.core.data.formats.limits import bounded_lines, read_whole
from tasks.core.data.formats.texts import BYTE_ORDER_MARK, excerpt, open_text
from tasks.core.errors import DataError

_START_BYTES = 1 << 16


def _rows(
    path: Path, list_name: str | None, tell_repeated: TellRepeated | None, *, may_be_one_value: bool
) -> Iterator[Row]:
    if _is_one_json_value(path, may_be_one_value):
        yield from _read_json(path, list_name, tell_repeated)
    else:
        yield from _read_json_lines(path, tell_repeated)


JSON_LINES = RowFormat((".jsonl", ".ndjson"), partial(_rows, may_be_one_value=False))
JSON = RowFormat((".json",), partial(_rows, may_be_one_value=True))


def _is_one_json_value(path: Path, may_be: bool) -> bool:
    """Exports often name JSON Lines `.json` and the other way round, so the content decides."""
    with open_text(path) as file:
        if file.read(_START_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            return True
        if not may_be:
            return False
        file.seek(0)
        lines = (line for line in bounded_lines(file, path) if line.strip())
        try:
            first = next(lines, b"").removeprefix(BYTE_ORDER_MARK).strip()
        except DataError:  # too long for a line of many
            return True
        try:
            orjson.loads(first)
        except orjson.JSONDecodeError:
            return True
        return next(lines, None) is None


def _read_json_lines(path: Path, tell_repeated: TellRepeated | None) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.isspace() or not line:
                continue
            row = _parse(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: not a JSON object but {_named_type(row)}: {_line(line)}",
                    'Each line must be one object, such as {"question": "…", "answer": "…"}.',
                )
            if tell_repeated is not None and (keys := repeated_keys(line, row)):
                tell_repeated(number, keys)
            yield row


def _read_json(path: Path, list_name: str | None, tell_repeated: TellRepeated | None) -> Sequence[Row]:
    """A list of objects, or an object with one list of objects (or several: `list_name` picks one)."""
    with open_text(path) as file:
        text = read_whole(file, path).removeprefix(BYTE_ORDER_MARK)
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
        return DataError(f"{where}: {error.msg}: {_line(text[:1000])}", "Make it flatter, or remove it.")
    lines = text.split(b"\n")  # as the parser counts them
    place = where if ", line" in where else f"{where}, line {error.lineno}"
    excerpt = _line(lines[min(error.lineno, len(lines)) - 1])
    return DataError(f"{place}: not valid JSON ({error.msg}): {excerpt}", "Correct or remove this line.")


def _line(line: bytes) -> str:
    return excerpt(line.decode("utf-8", "replace"))


def _named_type(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }.get(type(value), "a number")
