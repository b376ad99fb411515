"""A digest that a JSON object carries of itself, so that a changed figure in it is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import orjson

OWN_DIGEST = "content_sha256"
"""Field that holds the digest over all others, in the order of their names."""


class ForeignDigestError(ValueError):
    """The content of an object is not what its digest tells."""


def with_own_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with its digest as the last field."""
    return {**content, OWN_DIGEST: _digest_of(content)}


def without_own_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object without its digest, if it has one. Raises ForeignDigestError when that is not right."""
    others = {name: value for name, value in content.items() if name != OWN_DIGEST}
    if content.get(OWN_DIGEST) not in (None, _digest_of(others)):
        raise ForeignDigestError("its content has another digest than it tells")
    return others


def _digest_of(content: Mapping[str, Any]) -> str:
    try:
        text = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a whole number of more than 64 bits
        text = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()
