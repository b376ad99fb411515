"""JSON read and written value for value: whole numbers of any size, long decimals, repeated keys found.

orjson reads nearly everything and is fast, but it makes floats of whole numbers beyond 64 bits and says nothing of
a key that an object has twice. What it would lose is looked for in the text first, and then read by Python's reader.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import orjson

# A number this long may be more than a 64-bit integer or a float can hold.
_LONG_NUMBER = re.compile(rb"[0-9](?:[0-9.]{19}|[eE][-+]?[0-9]{3})")
# Found from its quotation mark: a search that begins with a look behind stops at every byte.
_KEY = re.compile(rb'"(?<!\\")\s*:')
DEEPEST_NESTING = 200
"""Levels of lists and objects in one another. orjson reads 1,024 of them but writes 254 only."""
TOO_DEEP = f"nested more than {DEEPEST_NESTING} levels deep"


def read_json(text: bytes) -> Any:
    """The value of a JSON text (UTF-8). NaN is None, infinities are texts, half surrogate pairs become `?`.

    Numbers are int or float; a decimal number that a float would change is a Decimal. Raises orjson.JSONDecodeError
    for what is no JSON or is nested too deeply, UnicodeDecodeError for what is no UTF-8.
    """
    value = _read_any(text)
    if text.count(b"[") + text.count(b"{") > DEEPEST_NESTING and _is_deeper(value, DEEPEST_NESTING):
        raise _too_deep()
    return value


def _read_any(text: bytes) -> Any:
    if _LONG_NUMBER.search(text) is None:
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            if "depth limit" in error.msg:
                raise _too_deep() from None
            return _read_leniently(text, error)
    return _read_leniently(text, None)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in one another on more than so many levels."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _too_deep() -> orjson.JSONDecodeError:
    return orjson.JSONDecodeError(TOO_DEEP, "", 0)


def _read_leniently(text: bytes, strict_error: orjson.JSONDecodeError | None) -> Any:
    """What only Python's own reader takes (NaN, half surrogate pairs, huge numbers) passes too."""
    decoded = text.decode("utf-8")
    try:
        value = json.loads(decoded, parse_constant=_constant, parse_float=_decimal, parse_int=_integer)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        if strict_error is not None:
            raise strict_error from None
        orjson.loads(text)  # raises with the place in the text
        raise orjson.JSONDecodeError(str(error), decoded, 0) from None
    return _repaired(value) if "\\u" in decoded else value


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # Python reads no integer of more than 4,300 digits
        return Decimal(digits)


def _decimal(written: str) -> float | Decimal:
    exact, near = Decimal(written), float(written)
    return near if exact == Decimal(repr(near)) else exact


def _repaired(value: Any) -> Any:
    """Half surrogate pairs, which no UTF-8 text can hold, become question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    if isinstance(value, dict):
        return {_repaired(name): _repaired(item) for name, item in value.items()}
    return value


def repeated_keys(text: bytes, value: Any) -> list[str]:
    """Keys that one object of `text` has more than once; `value` is what was read from it.

    The marks of keys in the text are counted against the keys that were read; only where they differ is the text
    read once more. A backslash at a text's end hides its mark, so such a text is always read.
    """
    if rb'\\"' not in text and len(_KEY.findall(text)) == _key_count(value):
        return []
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        found.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)

    json.loads(text, object_pairs_hook=note, parse_float=_ignored, parse_int=_ignored)
    return list(dict.fromkeys(found))


def _ignored(_: str) -> None:
    return None


def _key_count(value: Any) -> int:
    if isinstance(value, dict):
        inner = sum(_key_count(item) for item in value.values() if isinstance(item, (dict, list)))
        return len(value) + inner
    if isinstance(value, list):
        return sum(_key_count(item) for item in value if isinstance(item, (dict, list)))
    return 0


def write_json(value: Any) -> str:
    """Compact JSON of any value: order of keys and all digits kept, nothing escaped that need not be.

    What JSON has no form for is text: dates and times as in ISO 8601, bytes as UTF-8. NaN is null.
    """
    try:
        return orjson.dumps(value, default=_written).decode()
    except (
        TypeError,
        ValueError,
    ):  # whole numbers beyond 64 bits, keys that are no text, half surrogate pairs
        return orjson.dumps(_plain(value), default=_written).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            _clean(name if isinstance(name, str) else str(name)): _plain(item) for name, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return orjson.Fragment(str(int(value)))
    return value


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _written(value: Any) -> Any:
    if isinstance(value, Decimal):
        return orjson.Fragment(decimal_text(value)) if value.is_finite() else None
    if isinstance(value, (dt.date, dt.time, dt.timedelta)):
        return iso_text(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, uuid.UUID):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return list(value)
    return _clean(str(value))


def decimal_text(value: Decimal) -> str:
    """The number with all its places, `4.50`; with an exponent only where there is no end of zeros."""
    return format(value, "f") if -30 <= value.adjusted() <= 400 else str(value)


def iso_text(value: dt.date | dt.time | dt.timedelta) -> str:
    """A date, time, point in time or duration as ISO 8601 writes it: `2024-05-01`, `PT1H30M`."""
    if not isinstance(value, dt.timedelta):
        return value.isoformat()
    microseconds = (value.days * 86_400 + value.seconds) * 1_000_000 + value.microseconds
    sign, microseconds = ("-", -microseconds) if microseconds < 0 else ("", microseconds)
    seconds, fraction = divmod(microseconds, 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    last = f"{seconds}.{fraction:06d}".rstrip("0") if fraction else str(seconds)
    clock = "".join(
        f"{count}{unit}"
        for count, unit in ((hours, "H"), (minutes, "M"), (last, "S"))
        if count != 0 and count != "0"
    )
    date = f"{days}D" if days else ""
    return f"{sign}P{date}{'T' if clock else ''}{clock}" if date or clock else "PT0S"
