"""The files of the alias at one place. The rules are in `alias`; a folder and a bucket have their own ways to write."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from tasks.core.run_names import PROMOTED
from tasks.core.storage.versions import Version

POINTER_NAME = f"{PROMOTED}.json"
HISTORY_NAME = "promotions.jsonl"
MARK_NAME = ".promotion.unfinished"
LOCK_NAME = ".promotion.lock"

Action = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A change that was begun and not told as done, and the digests of the pointer and the last line before it."""

    change_id: str
    action: Action
    pointer_before: str | None
    previous: str | None = None


class OvertakenError(Exception):
    """Another machine has changed the history since it was read."""


class AliasFiles(Protocol):
    """Reads and writes pointer, history and mark; every write is whole, and there when the call returns."""

    def address(self, name: str) -> str:
        """The path or URL of a file, for messages."""

    def read(self, name: str) -> Version:
        """A file as it is now. Raises ModelLoadError where it is there and cannot be read, StorageError."""

    def read_mark(self, change_id: str | None) -> Mark | None:
        """The mark of the last change, which has this id; None without one, and for one that cannot be read."""

    def changing(self, wait_seconds: float) -> AbstractContextManager[None]:
        """Keep others from changing the alias, as far as the place can.

        Raises PromotionError when another one keeps it longer than that, StorageError.
        """

    def write_mark(self, mark: Mark) -> None:
        """Say that a change begins. Raises StorageError."""

    def remove_mark(self, mark: Mark | None) -> None:
        """Note that the change was told as done. A mark that cannot be removed is told of, and does no harm."""

    def add_line(self, before: Version, line: bytes, *, torn_bytes: int, anew: bool) -> None:
        """Add a line in place of a torn one, or begin a new history and keep the old one beside it.

        Raises StorageError, and OvertakenError where the history is no longer the one that was read.
        """

    def pointer_content(self, promotion: dict[str, Any], change_id: str) -> bytes:
        """What the pointer holds after a change."""

    def write_pointer(self, content: bytes, before: Version) -> None:
        """Move the pointer, unless another one has finished this change or made a later one. Raises StorageError."""

    def undo(self, before: Version, mark: Mark, *, torn_bytes: int, anew: bool) -> None:
        """Take back what a change that failed has written, as far as nobody else can have seen it."""

    def sweep(self, kept: Mark, dead: Set[str | None]) -> None:
        """Remove the marks of other changes that were to follow one of these lines, and no longer can."""

    def laid_aside(self) -> list[str]:
        """Addresses of damaged histories that are kept beside a new one, oldest first."""

    def has_link(self) -> Path | None:
        """The folder or link `promoted`, made by a person; None without one."""


def pretty(promotion: dict[str, Any]) -> bytes:
    """A pointer as it is written."""
    return orjson.dumps(promotion, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def sha256_of(content: bytes | None) -> str | None:
    """Digest of a file's content; None for no file."""
    return None if content is None else hashlib.sha256(content).hexdigest()
