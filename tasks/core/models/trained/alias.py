"""The alias of the promoted model: a pointer and a history, read and moved so that they always agree.

`promotions.jsonl` is the truth; `promoted.json` repeats what its last line says, for readers. A change is written in
this order, each step forced to the disk: its mark (`.promotion.unfinished`), its line of the history, the pointer;
then it is told, and the mark is removed. So after a death at any moment there are three cases. Without its line the
change never was. With its line it is decided: whoever uses the alias next moves the pointer. With the pointer it is
done, and a mark that is still there says that nobody was told. Anything else was not written here, and is an error.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from filelock import FileLock, Timeout

from tasks.core.errors import ConfigError, ModelLoadError, PromotionError, StorageError
from tasks.core.files import storage_error, write_atomically
from tasks.core.models.trained import history
from tasks.core.models.trained.history import History, read_file, read_history
from tasks.core.run_names import PROMOTED, check_run_name

logger = logging.getLogger(__name__)

POINTER_NAME = f"{PROMOTED}.json"
HISTORY_NAME = "promotions.jsonl"
MARK_NAME = ".promotion.unfinished"
LINE_FILES = (POINTER_NAME, HISTORY_NAME, MARK_NAME)
"""What says which model is promoted."""
_LOCK_SECONDS = 10.0

Action = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A change that was begun and not told as done, and the digest of the pointer before it."""

    change_id: str
    action: Action
    pointer_before: str | None


@dataclass(frozen=True, slots=True)
class Line:
    """What pointer, history and mark say; `is_damaged` where the history was passed over because of a damage."""

    pointer_bytes: bytes | None
    pointer: dict[str, Any] | None
    history: History
    mark: Mark | None
    is_damaged: bool = False

    @property
    def decided(self) -> dict[str, Any] | None:
        """The promotion of the last change."""
        return self.history.changes[-1].promotion if self.history.changes else None

    @property
    def untold(self) -> Mark | None:
        """The mark, if it is that of the last change."""
        last = self.history.changes[-1] if self.history.changes else None
        return self.mark if self.mark and last and self.mark.change_id == last.change_id else None

    @property
    def waits_for_pointer(self) -> bool:
        """Whether the last change is decided, and the pointer still as it was before."""
        mark = self.untold
        if mark is None or self.pointer == self.decided:
            return False
        return mark.pointer_before == _sha256(self.pointer_bytes)


# --- reading


def read_line(models_dir: Path, *, tolerant: bool = False) -> Line:
    """Read pointer, history and mark as they are; raises ModelLoadError for a damaged one.

    `tolerant` passes over what is damaged: such a pointer is None, such a history empty.
    """
    # The history first: a change between the readings then shows as a disagreement, which is looked at again.
    is_damaged = False
    try:
        found = read_history(models_dir / HISTORY_NAME)
    except ModelLoadError:
        if not tolerant:
            raise
        found, is_damaged = History(), True
    content, pointer = None, None
    try:
        content = read_file(models_dir / POINTER_NAME)
        pointer = None if content is None else _pointer(models_dir / POINTER_NAME, content)
    except ModelLoadError:
        if not tolerant:
            raise
    return Line(content, pointer, found, _mark(models_dir), is_damaged)


def agreed(models_dir: Path) -> Line:
    """The line, whose pointer and history agree; raises ModelLoadError where they do not."""
    line = read_line(models_dir)
    problem = _disagreement(models_dir, line)
    if problem is not None:
        raise problem
    return line


def _pointer(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(content)
        check_run_name(str(found["run_name"]))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelLoadError(
            f"{path} names no run: {str(error).partition(chr(10))[0]}",
            "put the file back from a copy, or `tuneproof promote RUN --force --reason TEXT` writes it anew",
        ) from error
    return dict(found)


def _mark(models_dir: Path) -> Mark | None:
    """None without a mark, and for one that cannot be read: the change then counts as told."""
    try:
        return Mark(**orjson.loads((models_dir / MARK_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _disagreement(models_dir: Path, line: Line) -> ModelLoadError | None:
    pointer, decided = line.pointer, line.decided
    if pointer == decided or (decided is None and not (pointer or {}).get("promotion_id")):
        return None  # nothing is promoted, a person wrote the pointer, or it is what the history says
    pointer_path, force = models_dir / POINTER_NAME, "--force --reason TEXT`"
    if decided is None:
        name = _name(pointer)
        return ModelLoadError(
            f"{pointer_path} says that {name} is promoted, but {HISTORY_NAME}, which has a line for each promotion, "
            "is missing or empty",
            f"put it back from a copy, or `tuneproof promote {name} {force} begins a new one",
        )
    name, where = _name(decided), f"line {line.history.changes[-1].number} of {HISTORY_NAME}"
    if pointer is None:
        return ModelLoadError(
            f"{pointer_path} is missing, but {where} says that {name} is promoted",
            f"put it back from a copy, or `tuneproof promote {name} {force} writes it again",
        )
    if name == _name(pointer):
        return ModelLoadError(
            f"{pointer_path} and {where}, the last, do not say the same about {name}",
            f"put back the one that was changed, or `tuneproof promote {name} {force} writes both anew",
        )
    return ModelLoadError(
        f"{pointer_path} says that {_name(pointer)} is promoted, but {where}, the last, says {name}",
        f"put back the one that is wrong, or decide: `tuneproof promote {name} {force}, or the same with "
        f"{_name(pointer)}",
    )


def _name(promotion: dict[str, Any] | None) -> str:
    return "no model" if promotion is None else str(promotion["run_name"])


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


# --- changing


@contextmanager
def locked(models_dir: Path) -> Iterator[None]:
    """Let one process at a time change the alias. Raises PromotionError when another one keeps it, StorageError."""
    lock = FileLock(models_dir / ".promotion.lock")
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise PromotionError(
            f"another promotion in {models_dir} is going on", "try again when it has ended"
        ) from error
    except OSError as error:
        failed = storage_error(error, models_dir)
        raise StorageError(f"{failed.what}. Nothing was changed", failed.next_step) from error
    try:
        yield
    finally:
        lock.release()


def settled(models_dir: Path) -> Line:
    """Finish a change that was cut off, and read the line; call it with the lock held.

    Raises ModelLoadError as `current_champion` does, StorageError when the pointer cannot be written.
    """
    line = read_line(models_dir, tolerant=True)
    if line.waits_for_pointer and line.decided is not None and line.mark is not None:
        write_atomically(models_dir / POINTER_NAME, _pretty(line.decided))
        change = "rollback to" if line.mark.action == "rollback" else "promotion of"
        logger.warning("a %s %s was cut off; it is finished now", change, _name(line.decided))
    return agreed(models_dir)


def move(models_dir: Path, line: Line, entry: dict[str, Any]) -> None:
    """Write a change down and move the pointer; `forget_mark` ends it. Call it with the lock held.

    `entry` is the new line of the history; where it follows a damaged history, it begins another. Raises
    StorageError that says what holds.
    """
    entry = {**entry, "change_id": secrets.token_hex(8), "previous": line.history.last_sha256}
    mark = Mark(entry["change_id"], entry["action"], _sha256(line.pointer_bytes))
    pointer, content = _pretty(entry["promotion"]), orjson.dumps(entry) + b"\n"
    history_path = models_dir / HISTORY_NAME
    size = history_path.stat().st_size - line.history.torn_bytes if history_path.exists() else 0
    try:
        write_atomically(models_dir / MARK_NAME, orjson.dumps(mark).decode())
        if line.is_damaged:
            history.begin_anew(history_path, content)
        else:
            history.append(history_path, content, line.history.torn_bytes)
        write_atomically(models_dir / POINTER_NAME, pointer)
    except StorageError as error:
        if read_line(models_dir, tolerant=True).pointer_bytes == pointer.encode():
            return  # what failed came after the move
        if not line.is_damaged:
            history.take_back(history_path, size)
        raise _what_holds(models_dir, line, mark, error) from error


def _what_holds(models_dir: Path, before: Line, mark: Mark, error: StorageError) -> StorageError:
    """The error of a change that could not be written, with what it left."""
    now = read_line(models_dir, tolerant=True)
    if now.untold == mark:
        return StorageError(
            f"{error.what}. {_name(now.decided)} is written down in {HISTORY_NAME} as promoted",
            "free some space or check the permissions: the next command that uses the promoted model writes the rest",
        )
    forget_mark(models_dir)
    held = "" if before.pointer is None else f": {_name(before.pointer)} is still promoted"
    return StorageError(f"{error.what}. Nothing was changed{held}", error.next_step)


def forget_mark(models_dir: Path) -> None:
    """Note that the change was told as done. A mark that cannot be removed is told of, and does no harm."""
    try:
        (models_dir / MARK_NAME).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed: %s", models_dir / MARK_NAME, error.strerror or error)


def _pretty(promotion: dict[str, Any]) -> str:
    return orjson.dumps(promotion, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
