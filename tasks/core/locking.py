"""Locks between processes of one machine; whoever is refused is told who holds them. A dead holder holds nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from tasks.core.provenance import now
from tasks.core.records import Record


class LockOwner(Record):
    """Who holds a lock."""

    pid: int
    host: str
    since: str


class HeldElsewhereError(Exception):
    """The lock is held; `holder` says by whom."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        super().__init__(holder)


@contextmanager
def owned_lock(lock_path: Path) -> Iterator[None]:
    """Hold the lock file, with its owner in `<name>.owner` beside it.

    The system lets go of it when the process ends, however it ends. Raises HeldElsewhereError at once when
    another process or object has it, OSError when the directory cannot be written.
    """
    owner_path = lock_path.with_name(f"{lock_path.name}.owner")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise HeldElsewhereError(_holder(owner_path)) from error
    try:
        since = now()
        owner = LockOwner(pid=os.getpid(), host=socket.gethostname(), since=since)
        owner_path.write_text(owner.model_dump_json())
        yield
    finally:
        owner_path.unlink(missing_ok=True)
        lock.release()


def _holder(owner_path: Path) -> str:
    try:
        owner = LockOwner.model_validate_json(owner_path.read_bytes())
    except (OSError, ValidationError):
        return "another process"
    return f"process {owner.pid} on {owner.host} since {owner.since}"
