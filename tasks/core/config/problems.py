"""Turning pydantic's findings into lines that name the place, the key, the value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tasks.core.config.describing import allowed, choices, nearest, shown
from tasks.core.config.sections import SECTIONS


def describe_problems(
    error: ValidationError, values: Mapping[str, Mapping[str, Any]], origins: Mapping[tuple[str, str], str]
) -> list[str]:
    """Give one line per wrong key (a union reports several findings for one) or per conflict of keys."""
    lines: dict[tuple[Any, ...], str] = {}
    for finding in error.errors(include_url=False):
        place = finding["loc"][:2]
        own_words = str(finding["ctx"]["error"]) if finding["type"] == "value_error" else None
        if len(place) < 2:
            lines.setdefault(
                (*place, own_words), _conflict(str(place[0]), own_words or finding["msg"], origins)
            )
        else:
            lines.setdefault(place, _wrong_value(str(place[0]), str(place[1]), own_words, values, origins))
    return list(lines.values())


def _conflict(section: str, message: str, origins: Mapping[tuple[str, str], str]) -> str:
    """A conflict names its keys; say where those among them that were given come from."""
    named = re.findall(r"\w+", message)
    places = [
        f"{key}: {origin}"
        for (of_section, key), origin in origins.items()
        if of_section == section and key in named
    ]
    return f"[{section}] {message}" + (f" ({'; '.join(places)})" if places else "")


def _wrong_value(
    section: str,
    key: str,
    own_words: str | None,
    values: Mapping[str, Mapping[str, Any]],
    origins: Mapping[tuple[str, str], str],
) -> str:
    field = SECTIONS[section].model_fields[key]
    value = values[section][key]
    must = own_words if own_words and own_words.startswith("must") else f"must be {allowed(field)}"
    line = f"{origins[section, key]}: [{section}] {key} = {shown(value)} {must}"
    wrong = value if isinstance(value, list | tuple) else [value]
    known = [str(choice) for part in (field.annotation, *field.metadata) for choice in choices(part)]
    near = {
        str(item): nearest(item, known)
        for item in wrong
        if isinstance(item, str) and item not in known and known
    }
    hints = [f"instead of {shown(item)} you may mean {shown(name)}" for item, name in near.items() if name]
    return f"{line}; {'; '.join(hints)}" if hints else line
