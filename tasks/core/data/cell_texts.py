"""What a cell means as text: one right answer or several, a number, a date, an object as its JSON."""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tasks.core.data.formats.json_texts import decimal_text, iso_text, write_json

# Beside these, `text` is SQuAD's way to say where in a passage the answers stand; beside others, a part of an object.
_BESIDE_TEXT = {"text", "answer_start", "answer_end", "start", "end", "answer_id", "id"}


class NotTextError(ValueError):
    """A cell that cannot be text; says what it is."""


def clean_text(text: str) -> str:
    """Replace half surrogate pairs, which no tokenizer and no UTF-8 file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def plain(value: Any) -> Any:
    """Arrays and scalars of numpy as lists and values of Python; other values as they are."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value


def scalar_text(value: Any) -> str | None:
    """The text of one value; None for what is missing, NaN, or blank. Raises NotTextError for bytes that are no text.

    Numbers keep their digits, true and false are written as in JSON, dates, times and durations as in ISO 8601.
    """
    value = plain(value)
    if value is None or isinstance(value, str):
        return clean_text(value) if value and value.strip() else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return decimal_text(value) if not value.is_nan() else None
    if isinstance(value, int):
        return write_json(value)  # str() refuses more than 4,300 digits
    if isinstance(value, float):
        return None if math.isnan(value) else str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(bytes(value))
    if value != value:  # a missing point in time of pandas
        return None
    if isinstance(value, (dt.date, dt.time, dt.timedelta)):
        return iso_text(value)
    return str(value) if isinstance(value, uuid.UUID) else clean_text(write_json(value))


def _decoded(value: bytes) -> str | None:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotTextError(f"not text but {len(value)} bytes that are no UTF-8") from error
    return text if text.strip() else None


def reference_texts(value: Any) -> tuple[str, ...]:
    """All right answers of a cell, each once, in their order; none where it is blank.

    A list of texts or numbers holds several right answers, so does SQuAD's `{"text": [...]}`. An object, or a list
    of objects or lists, is one answer: its JSON. Raises NotTextError.
    """
    value = plain(value)
    inner = _answers_inside(value)
    if inner is not None:
        value = plain(inner)
    if isinstance(value, Mapping):
        return (write_json(value),)
    if not isinstance(value, (list, tuple)):
        text = scalar_text(value)
        return () if text is None else (text,)
    items = [plain(item) for item in value]
    inside = [_answers_inside(item) for item in items]
    if items and all(answers is not None for answers in inside):
        found = [text for answers in inside for text in reference_texts(answers)]
    elif any(isinstance(item, (Mapping, list, tuple)) for item in items):
        return (write_json(items),)
    else:
        found = [text for text in map(scalar_text, items) if text is not None]
    return tuple(dict.fromkeys(found))


def _answers_inside(value: Any) -> Any:
    """The answers of an object that is SQuAD's form (`text`) or TriviaQA's (`value` and `aliases`); None for others."""
    if not isinstance(value, Mapping):
        return None
    text = value.get("text")
    if isinstance(plain(text), (str, list, tuple)) and value.keys() <= _BESIDE_TEXT:
        return text
    if isinstance(value.get("value"), str) and isinstance(plain(value.get("aliases")), (list, tuple)):
        return [value["value"], *plain(value["aliases"])]
    return None


def part_text(value: Any) -> str:
    """What a cell adds to a question made of several: a list of texts one a line, an object as its JSON."""
    value = plain(value)
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        if not any(isinstance(item, (Mapping, list, tuple)) for item in items):
            return "\n".join(text for text in map(scalar_text, items) if text is not None)
        return write_json(items)
    return write_json(value) if isinstance(value, Mapping) else scalar_text(value) or ""
