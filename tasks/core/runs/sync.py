"""A run directory and its copy at a URL: ledgers are sent while they grow, the manifest is sent last.

    <run>/identity.json, inferencer_output.jsonl, …, manifest.json     as on the disk
    <run>/ledgers/<part>/<ledger id>/<first byte>-<end>.jsonl          what was added to a ledger since
    <run>/ledgers/<part>/<ledger id>/sessions.jsonl, …                 what else that part wrote

Objects of a ledger are written once and never changed, so sending costs what was added and not the whole file.
"""

from __future__ import annotations

import logging
import posixpath
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import StorageError
from tasks.core.files import write_atomically
from tasks.core.records import RunIdentity
from tasks.core.runs.run_dir import RunDir
from tasks.core.storage.lease import lease
from tasks.core.storage.store import Store

logger = logging.getLogger(__name__)

WHOLE = "run"
"""Name of the part that is not a shard."""
_LEDGERS = "ledgers"
_MOST_BYTES_AT_ONCE = 64 * 2**20
# Sending may take a sixth of the time at most, however slow the network is.
_PAUSE_PER_SENDING = 5


@dataclass(frozen=True, slots=True)
class RunSync:
    """Brings a run here and sends it back; does nothing when the store is a path."""

    store: Store
    run: RunDir
    interval_seconds: float = 10.0

    def pull(self) -> None:
        """Bring what others finished of this run: published files, and rows in the ledgers. Raises StorageError."""
        if not self.store.is_remote:
            return
        name = self.run.path.name
        self.store.pull(name, leave_out=f"{name}/{_LEDGERS}/")
        for part in self.store.names_below(f"{name}/{_LEDGERS}"):
            for ledger_id in self.store.names_below(f"{name}/{_LEDGERS}/{part}"):
                if ledger_id != _known_id(self._part_dir(part)):
                    self._fetch_part(part, ledger_id)

    def _fetch_part(self, part: str, ledger_id: str) -> None:
        below = f"{self.run.path.name}/{_LEDGERS}/{part}/{ledger_id}"
        fetched = RunDir(self.run.fetched_path / f"{part}.{ledger_id}")
        fetched.path.mkdir(parents=True, exist_ok=True)
        have = fetched.ledger_path.stat().st_size if fetched.ledger_path.exists() else 0
        others = (fetched.sessions_path, fetched.references_path, fetched.references_seal_path)
        with fetched.ledger_path.open("r+b" if have else "wb") as ledger:
            for name in self.store.files_below(below):
                if name in [path.name for path in others]:
                    content = self.store.read(f"{below}/{name}") or b""
                    write_atomically(fetched.path / name, content.decode())
                    continue
                start, end = _span(name)
                if end > have:  # also where an earlier fetch was interrupted half-way
                    ledger.seek(start)
                    ledger.write(self.store.read(f"{below}/{name}") or b"")

    def claim(self, identity: RunIdentity) -> None:
        """Bind the run to `identity`, here and against other machines; of several that claim it at once one wins.

        Raises RunKeyMismatchError when it belongs to other settings.
        """
        name, path = self.run.path.name, self.run.identity_path
        if not path.exists():  # of answers that came since, its owner came before
            self.store.pull(name, only=[path.name])
        self.run.claim(identity)
        if self.store.is_remote and not self.store.write_once(f"{name}/{path.name}", path.read_bytes()):
            self.store.pull(name, only=[path.name])
            self.run.claim(identity)

    def push_published(self) -> None:
        """Send what is left of all ledgers of this machine, then the published files, the manifest last."""
        if not self.store.is_remote:
            return
        for part in [self.run, *(RunDir(path) for path in sorted(self.run.shards_path.glob("*-of-*")))]:
            if part.ledger_path.exists():
                self.push_part(part)
        references = (self.run.references_path, self.run.references_seal_path)
        self.store.push([*references, self.run.predictions_path, self.run.manifest_path])

    def push_part(self, part: RunDir) -> None:
        """Send what is left of a part's ledger, its sessions and reference scores."""
        if self.store.is_remote and (part.ledger_path.exists() or part.references_path.exists()):
            _Sender(self, part).finish()

    @contextmanager
    def sending(self, part: RunDir) -> Iterator[None]:
        """Send what is added to a part's ledger at intervals while the block runs, and all of it at its end.

        Trouble on the way is logged and tried again; what cannot be sent at the end is a StorageError.
        """
        if not self.store.is_remote:
            yield
            return
        sender, over = _Sender(self, part), threading.Event()
        thread = threading.Thread(target=sender.repeat, args=(over,), name="ledger-sender", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            sender.finish()

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the run against other machines. Raises RunLockedError naming the holder."""
        if not self.store.is_remote:
            yield
            return
        with lease(self.store, f"{self.run.path.name}/lease.json"):
            yield

    def _part_dir(self, part: str) -> RunDir:
        return self.run if part == WHOLE else RunDir(self.run.shards_path / part)


class _Sender:
    """Sends one ledger piece by piece; knows how much of it is there."""

    def __init__(self, sync: RunSync, part: RunDir) -> None:
        self._store, self._part = sync.store, part
        self._interval_seconds = sync.interval_seconds
        name = WHOLE if part == sync.run else part.path.name
        self._above = posixpath.join(sync.run.path.name, _LEDGERS, name)
        self._below: str | None = None
        self._sent = 0
        self._sent_sessions = -1

    def repeat(self, over: threading.Event) -> None:
        pause = self._interval_seconds
        while not over.wait(pause):
            began = time.monotonic()
            try:
                self.send()
            except StorageError as exc:
                logger.warning("the ledger could not be sent, it is tried again: %s", exc.what)
            pause = max(self._interval_seconds, _PAUSE_PER_SENDING * (time.monotonic() - began))

    def finish(self) -> None:
        self.send()
        for path in (self._part.references_path, self._part.references_seal_path):
            if path.exists():
                self._store.write(f"{self._below}/{path.name}", path.read_bytes())

    def send(self) -> None:
        """Send whole lines that are not there yet, and how long they took."""
        self._send_rows()
        path = self._part.sessions_path
        if path.exists() and path.stat().st_size != self._sent_sessions:
            content = path.read_bytes()
            self._store.write(f"{self._below}/{path.name}", content)
            self._sent_sessions = len(content)

    def _send_rows(self) -> None:
        if self._below is None:
            self._begin()
        if not self._part.ledger_path.exists():
            return
        with self._part.ledger_path.open("rb") as ledger:
            ledger.seek(self._sent)
            while piece := ledger.read(_MOST_BYTES_AT_ONCE):
                piece = piece[: piece.rfind(b"\n") + 1]
                if not piece:
                    return
                end = self._sent + len(piece)
                self._store.write(f"{self._below}/{self._sent:015d}-{end:015d}.jsonl", piece)
                self._sent = end
                ledger.seek(end)

    def _begin(self) -> None:
        """Find out how much is there. A ledger that is shorter than that was begun anew and gets a new id."""
        ledger_id = _known_id(self._part) or _new_id(self._part)
        sent = self._sent_before(ledger_id)
        size = self._part.ledger_path.stat().st_size if self._part.ledger_path.exists() else 0
        if sent > size:
            ledger_id, sent = _new_id(self._part), 0
        self._below, self._sent = f"{self._above}/{ledger_id}", sent

    def _sent_before(self, ledger_id: str) -> int:
        names = self._store.files_below(f"{self._above}/{ledger_id}")
        return max((_span(name)[1] for name in names if name[0].isdigit()), default=0)


def _span(name: str) -> tuple[int, int]:
    start, _, end = name.removesuffix(".jsonl").partition("-")
    return int(start), int(end)


def _id_path(part: RunDir) -> Path:
    return part.path / "ledger.id"


def _known_id(part: RunDir) -> str | None:
    path = _id_path(part)
    return path.read_text().strip() if path.is_file() else None


def _new_id(part: RunDir) -> str:
    ledger_id = secrets.token_hex(6)
    write_atomically(_id_path(part), ledger_id)
    return ledger_id
