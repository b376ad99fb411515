"""The alias at a URL: each step is a file that is written whole, and only to the version that was read.

The line in the history decides, as in a folder, and there it is the condition of its write that lets one of several
machines win; no lock is needed, so nobody waits for one that died. Where the store knows no conditions a lease keeps
the machines apart. Each change has a mark of its own, `.promotion.unfinished.<change>`, so that one that loses takes
nothing from one that wins; and the pointer names its change, so that no two changes write the same bytes and a
machine that stood still cannot put an old one back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from tasks.core.errors import PromotionError, RunLockedError, StorageError
from tasks.core.files import storage_error
from tasks.core.models.trained.alias_files import (
    HISTORY_NAME,
    LOCK_NAME,
    MARK_NAME,
    POINTER_NAME,
    Mark,
    OvertakenError,
    pretty,
)
from tasks.core.run_names import PROMOTED
from tasks.core.storage.lease import lease
from tasks.core.storage.store import Store
from tasks.core.storage.versions import Version, has_conditional_writes, read_version, replace_version

logger = logging.getLogger(__name__)

_LEASE_NAME = ".promotion.lease.json"
_ASIDE = f"{HISTORY_NAME}.damaged-"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class BucketAlias:
    """See `AliasFiles`."""

    store: Store

    def address(self, name: str) -> str:
        """See `AliasFiles`."""
        return self.store.address_of(name)

    def read(self, name: str) -> Version:
        """See `AliasFiles`."""
        return read_version(self.store, name)

    def read_mark(self, change_id: str | None) -> Mark | None:
        """See `AliasFiles`."""
        return self._mark(f"{MARK_NAME}.{change_id}") if change_id else None

    def _mark(self, name: str) -> Mark | None:
        try:
            return Mark(**orjson.loads(self.store.read(name) or b""))
        except (ValueError, TypeError):
            return None

    @contextmanager
    def changing(self, wait_seconds: float) -> Iterator[None]:
        """See `AliasFiles`: the processes of this machine take turns, and the machines too where they must."""
        end_at = time.monotonic() + wait_seconds
        lock = FileLock(self.store.local / LOCK_NAME)
        with ExitStack() as held:
            try:
                self.store.local.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=wait_seconds)
            except Timeout as error:
                raise PromotionError(
                    f"another promotion in {self.store.place} is going on", "try again when it has ended"
                ) from error
            except OSError as error:
                raise storage_error(error, self.store.local) from error
            held.callback(lock.release)
            if not has_conditional_writes(self.store):
                self._hold_lease(held, end_at)
            yield

    def _hold_lease(self, held: ExitStack, end_at: float) -> None:
        while True:
            try:
                held.enter_context(lease(self.store, _LEASE_NAME))
                return
            except RunLockedError as error:
                if time.monotonic() > end_at:
                    raise PromotionError(
                        f"another promotion is going on: {error.what}", error.next_step
                    ) from error
            time.sleep(_POLL_SECONDS)

    def write_mark(self, mark: Mark) -> None:
        """See `AliasFiles`."""
        self.store.write(f"{MARK_NAME}.{mark.change_id}", orjson.dumps(asdict(mark)))

    def remove_mark(self, mark: Mark | None) -> None:
        """See `AliasFiles`."""
        if mark is not None:
            self._remove(f"{MARK_NAME}.{mark.change_id}")

    def _remove(self, name: str) -> None:
        try:
            self.store.remove(name)
        except StorageError as error:
            logger.warning("%s could not be removed: %s", self.address(name), error.what)

    def add_line(self, before: Version, line: bytes, *, torn_bytes: int, anew: bool) -> None:
        """See `AliasFiles`."""
        content = before.content or b""
        if anew:
            self._lay_aside(content)
            content = line
        else:
            content = content[: len(content) - torn_bytes]
            content += line if not content or content.endswith(b"\n") else b"\n" + line
        if not replace_version(self.store, HISTORY_NAME, content, before):
            raise OvertakenError
        if anew:
            logger.warning("%s begins anew; a damaged one is kept beside it", self.address(HISTORY_NAME))

    def _lay_aside(self, content: bytes) -> None:
        number = 1
        while content and not self.store.write_once(f"{_ASIDE}{number}", content):
            if self.store.read(f"{_ASIDE}{number}") == content:
                return  # a change that failed has kept it already
            number += 1

    def pointer_content(self, promotion: dict[str, Any], change_id: str) -> bytes:
        """See `AliasFiles`."""
        return pretty({**promotion, "change_id": change_id})

    def write_pointer(self, content: bytes, before: Version) -> None:
        """See `AliasFiles`."""
        replace_version(self.store, POINTER_NAME, content, before)

    def undo(self, before: Version, mark: Mark, *, torn_bytes: int, anew: bool) -> None:
        """See `AliasFiles`: a line that is there may have been seen, and stays."""

    def sweep(self, kept: Mark, dead: Set[str | None]) -> None:
        """See `AliasFiles`."""
        try:
            for name in self.store.files_below(""):
                if not name.startswith(f"{MARK_NAME}.") or name.endswith(f".{kept.change_id}"):
                    continue
                mark = self._mark(name)
                if mark is None or mark.previous in dead:
                    self._remove(name)
        except StorageError as error:
            logger.warning("what was cut off earlier could not be removed: %s", error.what)

    def laid_aside(self) -> list[str]:
        """See `AliasFiles`."""
        names = [name for name in self.store.files_below("") if name.startswith(_ASIDE)]
        return [self.address(name) for name in sorted(names, key=lambda name: (len(name), name))]

    def has_link(self) -> Path | None:
        """See `AliasFiles`; there are no links at a URL."""
        return self.store.local / PROMOTED if self.store.has(PROMOTED) else None
