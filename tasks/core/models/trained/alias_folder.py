"""The alias in a folder of this machine: a file lock, a history that grows in place, each step forced to the disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from tasks.core.errors import PromotionError, StorageError
from tasks.core.files import storage_error, write_atomically
from tasks.core.models.trained import history
from tasks.core.models.trained.alias_files import (
    HISTORY_NAME,
    LOCK_NAME,
    MARK_NAME,
    POINTER_NAME,
    Mark,
    pretty,
)
from tasks.core.run_names import PROMOTED
from tasks.core.storage.versions import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FolderAlias:
    """See `AliasFiles`."""

    folder: Path

    def address(self, name: str) -> str:
        """See `AliasFiles`."""
        return str(self.folder / name)

    def read(self, name: str) -> Version:
        """See `AliasFiles`."""
        return Version(history.read_file(self.folder / name))

    def read_mark(self, change_id: str | None) -> Mark | None:
        """See `AliasFiles`; a folder has one mark, which may be another change's."""
        try:
            return Mark(**orjson.loads((self.folder / MARK_NAME).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @contextmanager
    def changing(self, wait_seconds: float) -> Iterator[None]:
        """See `AliasFiles`."""
        lock = FileLock(self.folder / LOCK_NAME)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait_seconds)
        except Timeout as error:
            raise PromotionError(
                f"another promotion in {self.folder} is going on", "try again when it has ended"
            ) from error
        except OSError as error:
            failed = storage_error(error, self.folder)
            raise StorageError(f"{failed.what}. Nothing was changed", failed.next_step) from error
        try:
            yield
        finally:
            lock.release()

    def write_mark(self, mark: Mark) -> None:
        """See `AliasFiles`."""
        content = {"change_id": mark.change_id, "action": mark.action, "pointer_before": mark.pointer_before}
        write_atomically(self.folder / MARK_NAME, orjson.dumps(content).decode())

    def remove_mark(self, mark: Mark | None) -> None:
        """See `AliasFiles`."""
        path = self.folder / MARK_NAME
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error.strerror or error)

    def add_line(self, before: Version, line: bytes, *, torn_bytes: int, anew: bool) -> None:
        """See `AliasFiles`; the lock keeps everybody else away."""
        path = self.folder / HISTORY_NAME
        if anew:
            history.begin_anew(path, line)
        else:
            history.append(path, line, torn_bytes)

    def pointer_content(self, promotion: dict[str, Any], change_id: str) -> bytes:
        """See `AliasFiles`."""
        return pretty(promotion)

    def write_pointer(self, content: bytes, before: Version) -> None:
        """See `AliasFiles`."""
        write_atomically(self.folder / POINTER_NAME, content.decode())

    def undo(self, before: Version, mark: Mark, *, torn_bytes: int, anew: bool) -> None:
        """See `AliasFiles`."""
        if not anew:
            history.take_back(self.folder / HISTORY_NAME, len(before.content or b"") - torn_bytes)

    def sweep(self, kept: Mark, dead: Set[str | None]) -> None:
        """See `AliasFiles`; a folder has one mark."""

    def laid_aside(self) -> list[str]:
        """See `AliasFiles`."""
        return list(map(str, history.laid_aside(self.folder / HISTORY_NAME)))

    def has_link(self) -> Path | None:
        """See `AliasFiles`."""
        link = self.folder / PROMOTED
        return link if link.is_symlink() or link.is_dir() else None
