"""JSON in a model's reply: the values that stand in it, in their order, and whether one of them was broken off."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

LONGEST_CHARACTERS = 100_000
"""Longest text that is looked through."""
_MOST_BROKEN = 1_000
_MOST_FOLLOWED_CHARACTERS = (
    1_000_000  # within what is broken off, each of which may be followed to the text's end
)
_OPENING = re.compile(r"[{\[]")
_BEGUN = re.compile(r'\{\s*"')


class SaidTwiceError(Exception):
    """An object names a field twice; which of both is meant cannot be told."""


@dataclass(frozen=True, slots=True)
class FoundJson:
    """Objects and lists of a text that stand in no other one; `written`: each as it stands there.

    `is_broken_off`: after the last of them an object begins that never becomes whole.
    """

    values: tuple[Any, ...]
    written: tuple[str, ...]
    is_broken_off: bool


def find_json(text: str) -> FoundJson:
    """Look for whole objects and lists, which may stand in prose or code fences.

    Raises SaidTwiceError. Of a text that is too long, or full of brackets that never close, only the beginning is
    looked at, and its end counts as broken off.
    """
    is_long, text = len(text) > LONGEST_CHARACTERS, text[:LONGEST_CHARACTERS]
    values: list[Any] = []
    written: list[str] = []
    position = broken = followed = 0
    is_broken_off = is_given_up = False
    while not is_given_up and (opening := _OPENING.search(text, position)) is not None:
        try:
            value, position = _DECODER.raw_decode(text, opening.start())
        except (ValueError, RecursionError) as error:
            is_broken_off = is_broken_off or _BEGUN.match(text, opening.start()) is not None
            position, broken = opening.end(), broken + 1
            followed += getattr(error, "pos", position) - opening.start()
            is_given_up = broken >= _MOST_BROKEN or followed >= _MOST_FOLLOWED_CHARACTERS
            continue
        values.append(value)
        written.append(text[opening.start() : position])
        is_broken_off = False
    return FoundJson(tuple(values), tuple(written), is_broken_off or is_long or is_given_up)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SaidTwiceError
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)
