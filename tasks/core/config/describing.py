"""What a key allows, in words: for messages about wrong values and for the configuration page."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import StringConstraints
from pydantic.fields import FieldInfo

from tasks.core.config.secrets import hide_secrets
from tasks.core.config.sections import InWords, Names

_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", NoneType: '"null"'}


def shown(value: Any, limit: int = 100) -> str:
    """Show a value as TOML would, shortened and without secrets."""
    if value is None:
        return '"null"'
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = (
        hide_secrets(text)
        if not isinstance(value, str)
        else json.dumps(hide_secrets(value), ensure_ascii=False)
    )
    return text if len(text) <= limit else f"{text[:limit]}..."


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Give the known name that is spelled most alike, if any is."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def choices(annotation: Any) -> list[Any]:
    """Give the fixed values that a type allows (its Literals and names), in order."""
    if isinstance(annotation, Names):
        return list(annotation.known())
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in choices(part)]


def allowed(field: FieldInfo) -> str:
    """Say what a field allows, e.g. `a whole number, at least 1, or "null"`."""
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(parts[0], parts[1:])
    metadata = tuple(metadata)
    names = [_one_of(item.known()) for item in metadata if isinstance(item, Names)]
    if said := [*names, *(item.text for item in metadata if isinstance(item, InWords))]:
        return ", or ".join(said)
    if origin in (Union, UnionType):
        return _union_in_words(parts)
    if origin is Literal:
        return _one_of(parts)
    if origin is tuple:
        items = choices(parts[0])
        others = "".join(f", or {words}" for words in _words_of_parts(parts[0]))
        return f"a list of {_one_of(items)}{others}" if items else "a list of texts"
    if origin is dict:
        return f"a table with {' and '.join(map(str, choices(parts[0])))}"
    return _PLAIN[annotation] + "".join(f", {bound}" for bound in _bounds(metadata))


def _words_of_parts(annotation: Any) -> list[str]:
    """Give what a type, or the parts of a union, say of themselves."""
    metadata = [
        item for part in (annotation, *get_args(annotation)) for item in getattr(part, "__metadata__", ())
    ]
    return [item.text for item in metadata if isinstance(item, InWords)]


def _union_in_words(parts: tuple[Any, ...]) -> str:
    literals = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    others = [part for part in parts if get_origin(part) is not Literal]
    words = [_in_words(part) for part in others if part is not NoneType]
    if literals:
        words.append(_one_of(literals))
    if NoneType in others:
        words.append(_PLAIN[NoneType])
    if len(words) == 1:
        return words[0]
    separator = ", or " if any(" " in word.removeprefix("a ") for word in words) else " or "
    return f"{', '.join(words[:-1])}{separator}{words[-1]}"


def _one_of(values: Iterable[Any]) -> str:
    texts = [shown(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _bounds(metadata: Iterable[Any]) -> list[str]:
    bounds: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            bounds += _bounds(item.metadata)
        elif isinstance(item, annotated_types.Ge):
            bounds.append(f"at least {item.ge}")
        elif isinstance(item, annotated_types.Gt):
            bounds.append(f"above {item.gt}")
        elif isinstance(item, annotated_types.Le):
            bounds.append(f"at most {item.le}")
        elif isinstance(item, annotated_types.Lt):
            bounds.append(f"below {item.lt}")
        elif isinstance(item, annotated_types.MaxLen):
            bounds.append(f"at most {item.max_length} characters")
        elif isinstance(item, StringConstraints):
            bounds += ["not empty"] if item.min_length else []
    return bounds
