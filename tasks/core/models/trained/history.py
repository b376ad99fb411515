r"""`promotions.jsonl`: a line for each change of the promoted model, read strictly and added to whole or not at all.

Only b"\n" ends a line: a reason may hold any other character that some reader takes for the end of a line. Each line
holds the digest of the one before it, so one that is gone or was changed shows.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tasks.core.errors import ConfigError, ModelLoadError, StorageError
from tasks.core.files import flush_to_disk, storage_error, write_atomically
from tasks.core.run_names import check_run_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """A whole line of the history: its bytes, its number from 1, and the promotion that holds from then on."""

    line: bytes
    number: int
    change_id: str
    promotion: dict[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """The whole lines, oldest first; `torn_bytes` follow the last: an addition that was cut off."""

    changes: tuple[Change, ...] = ()
    torn_bytes: int = 0

    @property
    def last_sha256(self) -> str | None:
        """Digest of the last line, which the next one names."""
        return hashlib.sha256(self.changes[-1].line).hexdigest() if self.changes else None


def read_history(path: Path) -> History:
    """Read a history; an absent one is empty. Raises ModelLoadError that names the line that is damaged."""
    return parsed_history(path, read_file(path) or b"")


def parsed_history(path: Path | str, content: bytes) -> History:
    """Read the content of a history, which is at a path or URL. Raises ModelLoadError like `read_history`."""
    changes: list[Change] = []
    *ended, rest = content.split(b"\n")
    for number, line in enumerate(ended, start=1):
        if line.strip():
            changes.append(_change(path, number, line.strip(), changes))
    try:
        orjson.loads(rest)
    except ValueError:
        return History(tuple(changes), len(rest))
    changes.append(_change(path, len(ended) + 1, rest.strip(), changes))  # only its newline is missing
    return History(tuple(changes))


def _change(path: Path | str, number: int, line: bytes, before: list[Change]) -> Change:
    try:
        found = orjson.loads(line)
        promotion, action = found["promotion"], found["action"]
        if action not in ("promote", "rollback"):
            raise ValueError(f"{action!r} is no action")
        check_run_name(promotion["run_name"])
        change_id, previous = str(found.get("change_id", "")), found.get("previous")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise damaged(path, number, reason) from error
    is_chained = bool(change_id) or previous is not None  # lines of earlier versions name none
    if is_chained and previous != History(tuple(before)).last_sha256:
        raise damaged(path, number, "the line before it is gone or was changed, or it is there twice")
    return Change(line, number, change_id, promotion)


def damaged(path: Path | str, number: int, why: str) -> ModelLoadError:
    """The error about a line of the history."""
    return ModelLoadError(
        f"{path}, line {number} is damaged: {why}",
        "put the file back from a copy; or `tuneproof promote RUN --force --reason TEXT` keeps it beside and begins "
        "a new history with RUN, before which no rollback goes",
    )


def read_file(path: Path) -> bytes | None:
    """The content of a file, None where there is none. Raises ModelLoadError when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read: {error.strerror or error}", "check what it is and its permissions"
        ) from error


def append(path: Path, line: bytes, torn_bytes: int) -> None:
    """Add a line, forced to the disk, in place of a torn one. Raises StorageError; the file is then as it was."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            size = os.fstat(descriptor).st_size - torn_bytes
            if torn_bytes:
                logger.warning("%s: an addition of %d bytes was cut off and is left out", path, torn_bytes)
                os.ftruncate(descriptor, size)
            ended = not size or os.pread(descriptor, 1, size - 1) == b"\n"
            try:
                _write_at(descriptor, size, line if ended else b"\n" + line)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(error, path) from error
    flush_to_disk(path.parent)


def _write_at(descriptor: int, offset: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def take_back(path: Path, size: int) -> None:
    """Cut a history back to `size` bytes, as far as the system lets us; needs no space."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def begin_anew(path: Path, line: bytes) -> None:
    """Replace a damaged history by one that has one line, and keep the damaged one beside it. Raises StorageError.

    Where the history is gone there is nothing to keep.
    """
    if not path.exists():
        append(path, line, 0)
        logger.warning("%s begins anew; the one that was there is gone", path)
        return
    aside_path = path.with_name(f"{path.name}.damaged-{1 + len(laid_aside(path))}")
    try:
        aside_path.hardlink_to(path)
    except OSError:  # a file system without hard links
        try:
            aside_path.write_bytes(path.read_bytes())
        except OSError as error:
            raise storage_error(error, aside_path) from error
    try:
        write_atomically(path, line.decode())
    except StorageError:
        if read_file(path) != line:
            with suppress(OSError):
                aside_path.unlink()
            raise
    logger.warning("%s begins anew; the damaged one is kept as %s", path, aside_path.name)


def laid_aside(path: Path) -> list[Path]:
    """Histories that were damaged and are kept beside a new one, oldest first."""
    return sorted(path.parent.glob(f"{path.name}.damaged-*"), key=lambda one: (len(one.name), one.name))
