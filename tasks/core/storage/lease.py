"""Who works on a run at a URL: a file there that its holder renews, since no lock reaches beyond one machine."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from tasks.core.errors import RunLockedError, StorageError
from tasks.core.files import write_once
from tasks.core.records import Record
from tasks.core.storage.store import Store

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
_RENEW_SECONDS = 30.0


class Lease(Record):
    """What the file says: who, and until when it counts (seconds since 1970)."""

    machine: str
    host: str
    pid: int
    until: float


@contextmanager
def lease(store: Store, name: str) -> Iterator[None]:
    """Hold `name` for this machine and renew it; a holder that died is waited out for two minutes at most.

    Processes of one machine share it (a file lock parts them). Of two machines that ask for a free one at once, one
    gets it; two that find one that has run out may both take it over; a run has one identity, so nothing is mixed
    then, only computed twice. Raises RunLockedError.
    """
    machine = _machine(store)
    holder = _read(store, name)
    if holder is None and not store.write_once(name, _content(machine)):
        holder = _read(store, name)
    if holder is not None and holder.machine != machine and holder.until > time.time():
        raise RunLockedError(
            f"{store.place}/{name.rpartition('/')[0]} is being written by process {holder.pid} on {holder.host}",
            f"wait for it to end; if it died, for {holder.until - time.time():.0f} s, or use another run name",
        )
    over = threading.Event()
    store.write(name, _content(machine))
    thread = threading.Thread(target=_renew, args=(store, name, machine, over), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        try:
            if _is_held_by(store, name, machine):
                store.remove(name)
        except StorageError as exc:
            logger.warning("%s", exc.what)


def _renew(store: Store, name: str, machine: str, over: threading.Event) -> None:
    while not over.wait(_RENEW_SECONDS):
        try:
            if not _is_held_by(store, name, machine):
                logger.warning(
                    "%s/%s was taken over by another machine, which found it had run out", store.place, name
                )
                return
            store.write(name, _content(machine))
        except StorageError as exc:
            logger.warning("%s", exc.what)


def _is_held_by(store: Store, name: str, machine: str) -> bool:
    """Whether no other machine took over, as it may when this one stood still for longer than the lease."""
    holder = _read(store, name)
    return holder is None or holder.machine == machine


def _content(machine: str) -> bytes:
    until = time.time() + LEASE_SECONDS
    holder = Lease(machine=machine, host=socket.gethostname(), pid=os.getpid(), until=until)
    return holder.model_dump_json().encode()


def _read(store: Store, name: str) -> Lease | None:
    content = store.read(name)
    try:
        return None if content is None else Lease.model_validate_json(content)
    except ValidationError:
        return None


def _machine(store: Store) -> str:
    """Name of this machine's mirror, drawn once."""
    path = store.local / ".machine"
    write_once(path, secrets.token_hex(8))
    return path.read_text().strip()
