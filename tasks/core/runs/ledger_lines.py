"""One line of a ledger: JSON with a checksum at its end, and what it must hold to be an answer.

    {"id":"5f0c…-0","text":"…",…,"error":null,"crc32":"89abcdef"}

The checksum is CRC-32 over the run's key and all bytes before `,"crc32"`: it finds every damage of up to 32 bits in a
row, and lines of another run. Ledgers of older versions have lines without one; those count when each of their fields
is known and of its type.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from tasks.core.records import Completion

_MARK = b',"crc32":"'
_DIGITS = 8
_END = b'"}\n'
_TAIL = len(_MARK) + _DIGITS + len(_END)
_START = b'{"id":"'


class DamagedLineError(ValueError):
    """A line is not what was written; the message says in a few words how that shows."""


def written(record: Mapping[str, Any], run_key: str) -> bytes:
    """Return the line that holds a record, whose first field is `id`, and its checksum."""
    body = orjson.dumps(record)[:-1]
    return b"%b%b%08x%b" % (body, _MARK, _checksum(body, run_key), _END)


def without_checksum(line: bytes, run_key: str) -> bytes:
    """Return the record alone, as a line. Raises DamagedLineError where the checksum is not that of the line."""
    if line[-_TAIL : -_TAIL + len(_MARK)] != _MARK:
        return line
    body, told = line[:-_TAIL], line[-len(_END) - _DIGITS : -len(_END)]
    if told != b"%08x" % _checksum(body, run_key) or line[-len(_END) :] != _END:
        raise DamagedLineError("its checksum is not that of its content in this run")
    return body + b"}\n"


def _checksum(body: bytes, run_key: str) -> int:
    return zlib.crc32(body, zlib.crc32(run_key.encode()))


def whole_line_behind(line: bytes, run_key: str) -> int | None:
    """Tell where a whole line begins behind one whose end was damaged; None where there is no such thing."""
    start = line.rfind(_START)
    if start <= 0 or _is_whole(line, run_key) or not _is_whole(line[start:], run_key):
        return None
    return start


def _is_whole(line: bytes, run_key: str) -> bool:
    """Whether it has a checksum and that is right."""
    try:
        return without_checksum(line, run_key) is not line
    except DamagedLineError:
        return False


def completion_in(line: bytes) -> Completion:
    """Return the answer that a line without its checksum holds. Raises DamagedLineError when it holds none."""
    return Completion(**_fields(line, _COMPLETION))


def completion_head(line: bytes) -> tuple[str, bool]:
    """Return the id of the row that a line answers, and whether it is an error row. Raises DamagedLineError."""
    fields = _fields(line, _COMPLETION)
    return fields["id"], fields.get("error") is not None


def score_head(line: bytes) -> tuple[str, bool]:
    """The same for a line of reference scores."""
    fields = score_in(line)
    return fields["id"], fields.get("error") is not None


def score_in(line: bytes) -> dict[str, Any]:
    """Return what a line of reference scores holds: {id, tokens, negative_log_likelihood} or {id, error}.

    Raises DamagedLineError.
    """
    return _fields(line, _ERROR if b'"error"' in line else _SCORE)


def _fields(line: bytes, form: Mapping[str, tuple[Callable[[Any], bool], bool]]) -> dict[str, Any]:
    """Return the fields of a line, each known and of its type. Raises DamagedLineError."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as exc:
        raise DamagedLineError(f"no JSON: {line[:60]!r}") from exc
    if not isinstance(fields, dict):
        raise DamagedLineError(f"no object: {line[:60]!r}")
    for name, value in fields.items():
        if name not in form:
            raise DamagedLineError(f"unknown field {name[:40]!r}")
        if not form[name][0](value):
            raise DamagedLineError(f"{name} = {str(value)[:40]!r}")
    for name, (_, is_needed) in form.items():
        if is_needed and name not in fields:
            raise DamagedLineError(f"{name} is missing")
    if form is _COMPLETION and (fields.get("error") is None) == (fields["finish_reason"] == "error"):
        raise DamagedLineError(f"error = {str(fields.get('error'))[:40]!r}, but {fields['finish_reason']!r}")
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_reason(value: Any) -> bool:
    return value in ("stop", "length", "error")


# Field: of which type, and whether every line has it.
_COMPLETION = {
    "id": (_is_name, True),
    "text": (_is_text, True),
    "finish_reason": (_is_reason, True),
    "prompt_tokens": (_is_count, True),
    "completion_tokens": (_is_count, True),
    "seconds": (_is_number, True),
    "batch_size": (_is_count, True),
    "truncated_tokens": (_is_count, False),
    "error": (_is_text_or_none, False),
    "reasoning": (_is_text_or_none, False),
    "reasoning_tokens": (_is_count, False),
    "is_cut_in_thoughts": (_is_bool, False),
}
_SCORE = {
    "id": (_is_name, True),
    "tokens": (_is_count, True),
    "negative_log_likelihood": (_is_finite, True),
}
_ERROR = {"id": (_is_name, True), "error": (_is_name, True)}
