"""Names of runs, which are folders on any machine: what may be one, and how one is made up."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from tasks.core.errors import ConfigError

PROMOTED = "promoted"
"""What the model in use is called wherever a model is named."""

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RUN_NAME_LIMIT = 100
# Two slugs, a time or key and a short prefix fit into one run name.
_SLUG_LIMIT = 36
_DIGEST_LENGTH = 5
# As long as the time in the name of a training, 20261127-143000.
_TAIL_LENGTH = 15
# Windows opens a device instead of a file of this name, with any ending.
_DEVICES = frozenset(
    ("con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10)))
)
# The alias, its history and the pages that lie beside the folders of runs and models.
_OWN_FILES = ("promoted.json", "promotions.jsonl", "challenges.jsonl", "challenges.json", "leaderboard.html")


def why_no_name(name: str) -> str | None:
    """Why a name cannot be a folder's on every machine, or belongs to something else; None when it can be taken."""
    plain = name.lower()  # Windows and macOS take Promoted and promoted for the same
    if len(name) > _RUN_NAME_LIMIT:
        return f"it has {len(name)} characters, at most {_RUN_NAME_LIMIT} are allowed"
    if _RUN_NAME.fullmatch(name) is None or ".." in name:
        return "a name starts with a letter or digit; letters, digits, '.', '_' and '-' follow, never '..'"
    if name.endswith("."):
        return "it ends with '.', which Windows leaves out"
    if plain == PROMOTED:
        return "it is reserved for the model in use"
    if plain.split(".")[0] in _DEVICES:
        return f"it is reserved: {name.split('.')[0]} is a device on Windows"
    if any(plain == own or plain.startswith(f"{own}.") for own in _OWN_FILES):
        return "it is reserved for a file beside the runs and models"
    return None


def check_run_name(run_name: str) -> str:
    """Give the name back if it can be a folder's name and nothing else; ConfigError otherwise."""
    problem = why_no_name(run_name)
    if problem is not None:
        raise ConfigError(
            f"run name {run_name[:120]!r} is not allowed: {problem}",
            f"take for example {_suggestion(run_name)!r}",
        )
    return run_name


_DATA_SUFFIXES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def slug(name: str) -> str:
    """Make a Hub id, path or package: name a part of a run name: its last part, without a file's suffix."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    stem = re.sub(r"\.(gguf|jsonl|json|csv|tsv|parquet)$", "", last, flags=re.IGNORECASE)
    cleaned = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", stem.lower()).strip("._-")
    free = f"my-{cleaned}" if cleaned.split(".")[0] in _DEVICES else cleaned
    return shortened(free, _SLUG_LIMIT) or "unnamed"


def shortened(name: str, limit: int) -> str:
    """Give a name of at most `limit` (30 or more) characters that stays as unique as `name` is.

    The middle goes: a name ends with what tells it from others, such as its time, and a digest stands for the rest.
    """
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    tail = name[-_TAIL_LENGTH:].strip("._-")
    head = name[: limit - len(digest) - len(tail) - 2].strip("._-")
    return f"{head}-{digest}-{tail}"


def made_up_name(name: str, prefix: str, suffix: str) -> str:
    """Put prefix and suffix around a name that nobody gave, which is shortened to fit; ConfigError if it cannot."""
    room = max(_SLUG_LIMIT, _RUN_NAME_LIMIT - len(prefix) - len(suffix))
    return check_run_name(f"{prefix}{shortened(name, room)}{suffix}")


def data_slug(data_id: str | Sequence[str]) -> str:
    """The same for data: of a pattern the last part that says something, of several the first and how many more."""
    first, *others = [data_id] if isinstance(data_id, str) else data_id
    if any(mark in first for mark in "*?["):
        parts = [re.sub(r"\[[^\]]*\]|[*?]", "", part) for part in re.split(r"[/\\]", first)]
        names = [
            name for part in parts if (name := slug(part) if part.strip(".") else "unnamed") != "unnamed"
        ]
        name = next((name for name in reversed(names) if f".{name}" not in _DATA_SUFFIXES), "unnamed")
    else:
        name = slug(first)
    return f"{name}-and-{len(others)}-more" if others else name


def _suggestion(run_name: str) -> str:
    cleaned = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", run_name))
    name = cleaned.strip("._-")[:_RUN_NAME_LIMIT].rstrip(".") or "my-run"
    return name if why_no_name(name) is None else f"my-{name}"[:_RUN_NAME_LIMIT]
