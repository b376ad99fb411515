"""The alias of the promoted model: a pointer and a history, read and moved so that they always agree.

`promotions.jsonl` is the truth; `promoted.json` repeats what its last line says, for readers. A change is written in
this order, each step whole and forced to the disk: its mark (`.promotion.unfinished`), its line of the history, the
pointer; then it is told, and the mark is removed. So after a death at any moment there are three cases. Without its
line the change never was. With its line it is decided: whoever uses the alias next moves the pointer. With the pointer
it is done, and a mark that is still there says that nobody was told. Anything else was not written here, and is an
error. These are the rules of every place; `alias_folder` and `alias_bucket` write the files.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tasks.core.errors import ConfigError, ModelLoadError, PromotionError, StorageError
from tasks.core.models.trained.alias_bucket import BucketAlias
from tasks.core.models.trained.alias_files import (
    HISTORY_NAME,
    MARK_NAME,
    POINTER_NAME,
    AliasFiles,
    Mark,
    OvertakenError,
    sha256_of,
)
from tasks.core.models.trained.alias_folder import FolderAlias
from tasks.core.models.trained.history import History, parsed_history
from tasks.core.run_names import check_run_name
from tasks.core.storage.store import Store, as_store
from tasks.core.storage.versions import Version

logger = logging.getLogger(__name__)

LINE_FILES = (POINTER_NAME, HISTORY_NAME, MARK_NAME)
"""What says which model is promoted."""
_LOCK_SECONDS = 10.0


def alias_files(models: Store | Path) -> AliasFiles:
    """The files of the alias in the folder or at the URL of the models."""
    store = as_store(models)
    return BucketAlias(store) if store.is_remote else FolderAlias(store.local)


@dataclass(frozen=True, slots=True)
class Line:
    """What pointer, history and mark say; `is_damaged` where the history was passed over because of a damage."""

    pointer_version: Version
    pointer: dict[str, Any] | None
    history_version: Version
    history: History
    mark: Mark | None
    is_damaged: bool = False
    lacks_pointer: bool = False
    """Whether the pointer was passed over because of a damage."""

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
        return mark.pointer_before == sha256_of(self.pointer_version.content)


# --- reading


def read_line(models: Store | Path, *, tolerant: bool = False) -> Line:
    """Read pointer, history and mark as they are; raises ModelLoadError for a damaged one, StorageError.

    `tolerant` passes over what is damaged: such a pointer is None, such a history empty.
    """
    files = alias_files(models)
    # The history first: a change between the readings then shows as a disagreement, which is looked at again.
    is_damaged, history_version, pointer_version = False, Version(), Version()
    try:
        history_version = files.read(HISTORY_NAME)
        found = parsed_history(files.address(HISTORY_NAME), history_version.content or b"")
    except ModelLoadError:
        if not tolerant:
            raise
        found, is_damaged = History(), True
    pointer, lacks_pointer = None, False
    try:
        pointer_version = files.read(POINTER_NAME)
        if pointer_version.content is not None:
            pointer = _pointer(files.address(POINTER_NAME), pointer_version.content)
    except ModelLoadError:
        if not tolerant:
            raise
        lacks_pointer = True
    mark = files.read_mark(found.changes[-1].change_id if found.changes else None)
    return Line(pointer_version, pointer, history_version, found, mark, is_damaged, lacks_pointer)


def agreed(models: Store | Path) -> Line:
    """The line, whose pointer and history agree; raises ModelLoadError where they do not."""
    line = read_line(models)
    problem = _disagreement(models, line)
    if problem is not None:
        raise problem
    return line


def _pointer(address: str, content: bytes) -> dict[str, Any]:
    try:
        found = dict(orjson.loads(content))
        check_run_name(str(found["run_name"]))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelLoadError(
            f"{address} names no run: {str(error).partition(chr(10))[0]}",
            "put the file back from a copy, or `tuneproof promote RUN --force --reason TEXT` writes it anew",
        ) from error
    found.pop("change_id", None)  # which one at a URL was written last
    return found


def _disagreement(models: Store | Path, line: Line) -> ModelLoadError | None:
    pointer, decided = line.pointer, line.decided
    if pointer == decided or (decided is None and not (pointer or {}).get("promotion_id")):
        return None  # nothing is promoted, a person wrote the pointer, or it is what the history says
    pointer_path, force = alias_files(models).address(POINTER_NAME), "--force --reason TEXT`"
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


# --- changing


@contextmanager
def locked(models: Store | Path) -> Iterator[None]:
    """Let one process at a time change the alias. Raises PromotionError when another one keeps it, StorageError.

    At a URL with conditional writes other machines are not kept out: of two changes one holds, the other is told.
    """
    with alias_files(models).changing(_LOCK_SECONDS):
        yield


def settled(models: Store | Path) -> Line:
    """Finish a change that was cut off, and read the line; call it with the lock held.

    Raises ModelLoadError as `current_champion` does, StorageError when the pointer cannot be written.
    """
    files, before = alias_files(models), None
    while True:
        line = read_line(models, tolerant=True)
        if line.waits_for_pointer and line.decided is not None and line.mark is not None:
            content = files.pointer_content(line.decided, line.mark.change_id)
            files.write_pointer(content, line.pointer_version)
            change = "rollback to" if line.mark.action == "rollback" else "promotion of"
            logger.warning("a %s %s was cut off; it is finished now", change, _name(line.decided))
            line = read_line(models, tolerant=True)
        is_whole = not line.is_damaged and not line.lacks_pointer
        if is_whole and _disagreement(models, line) is None:
            return line
        if line == before:
            return agreed(models)
        before = line  # another machine may have changed something between the readings


def move(models: Store | Path, line: Line, entry: dict[str, Any]) -> Mark:
    """Write a change down and move the pointer; `forget_mark` ends it. Call it with the lock held.

    `entry` is the new line of the history; where it follows a damaged history, it begins another. Raises
    PromotionError when another machine was faster, StorageError that says what holds.
    """
    files = alias_files(models)
    entry = {**entry, "change_id": secrets.token_hex(8), "previous": line.history.last_sha256}
    before = sha256_of(line.pointer_version.content)
    mark = Mark(entry["change_id"], entry["action"], before, entry["previous"])
    pointer, content = files.pointer_content(entry["promotion"], mark.change_id), orjson.dumps(entry) + b"\n"
    written: dict[str, Any] = {"torn_bytes": line.history.torn_bytes, "anew": line.is_damaged}
    try:
        files.write_mark(mark)
        files.add_line(line.history_version, content, **written)
        files.write_pointer(pointer, line.pointer_version)
    except OvertakenError:
        files.remove_mark(mark)
        raise _overtaken(models) from None
    except StorageError as error:
        if _pointer_holds(models, pointer):
            return mark  # what failed came after the move
        files.undo(line.history_version, mark, **written)
        raise _what_holds(models, line, mark, error) from error
    files.sweep(mark, {None, *(hashlib.sha256(change.line).hexdigest() for change in line.history.changes)})
    return mark


def _overtaken(models: Store | Path) -> PromotionError:
    now = read_line(models, tolerant=True)
    return PromotionError(
        f"another promotion or rollback in {as_store(models).place} was made at the same moment: "
        f"{_name(now.decided)} is promoted now",
        "nothing else was changed; look at `tuneproof models --history`, and decide again",
    )


def _pointer_holds(models: Store | Path, content: bytes) -> bool:
    try:
        return read_line(models, tolerant=True).pointer_version.content == content
    except StorageError:
        return False


def _what_holds(models: Store | Path, before: Line, mark: Mark, error: StorageError) -> StorageError:
    """The error of a change that could not be written, with what it left."""
    try:
        now = read_line(models, tolerant=True)
    except StorageError:
        return StorageError(
            f"{error.what}. Whether the change was written down cannot be asked now",
            f"{error.next_step}; the next command that uses the promoted model finishes it if it was",
        )
    if now.untold is not None and now.untold.change_id == mark.change_id:
        return StorageError(
            f"{error.what}. {_name(now.decided)} is written down in {HISTORY_NAME} as promoted",
            "free some space or check the permissions: the next command that uses the promoted model writes the rest",
        )
    if not as_store(models).is_remote:  # at a URL a write that is still on its way may need it
        forget_mark(models, mark)
    held = "" if before.pointer is None else f": {_name(before.pointer)} is still promoted"
    return StorageError(f"{error.what}. Nothing was changed{held}", error.next_step)


def forget_mark(models: Store | Path, mark: Mark | None) -> None:
    """Note that the change was told as done. A mark that cannot be removed is told of, and does no harm."""
    alias_files(models).remove_mark(mark)
