"""Who works on a run at a URL: a file there that its holder renews, since no lock reaches beyond one machine."""

from __future__ import annotations

import logging
import os
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from tasks.core.errors import RunLockedError, StorageError
from tasks.core.files import write_once
from tasks.core.records import Record
from tasks.core.storage.store import Store
from tasks.core.storage.versions import Version, has_conditional_writes, read_version, replace_version

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
_RENEW_SECONDS = 30.0
_SETTLING_SECONDS = 0.1


class Lease(Record):
    """What the file says: who, and until when it counts (seconds since 1970)."""

    machine: str
    host: str
    pid: int
    until: float


@contextmanager
def lease(store: Store, name: str) -> Iterator[None]:
    """Hold `name` for this machine and renew it; a holder that died is waited out for two minutes at most.

    One that died on this very system is known to be dead and not waited for. Processes of one machine share it (a
    file lock parts them). Of two machines that ask for it at once one gets it where the store has conditional writes;
    elsewhere both may: a run has one identity, so nothing is mixed then, only computed twice. Raises RunLockedError.
    """
    machine = _machine(store)
    _take(store, name, machine)
    over = threading.Event()
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


def _take(store: Store, name: str, machine: str) -> None:
    seen = read_version(store, name)
    if _may_take(_parsed(seen), machine) and replace_version(store, name, _content(machine), seen):
        if has_conditional_writes(store):
            return
        time.sleep(_SETTLING_SECONDS)  # another machine that saw what this one saw may have written since
    holder = _read(store, name)
    if holder is not None and holder.machine == machine:  # also where another process of it was faster
        return
    what, wait = "is being taken by another machine at this moment", "try again"
    if holder is not None and not _may_take(holder, machine):
        what = f"is being written by process {holder.pid} on {holder.host}"
        wait = f"wait for it to end; if it died, for {holder.until - time.time():.0f} s"
    place = store.address_of(posixpath.dirname(name)).rstrip("/")
    raise RunLockedError(f"{place} {what}", f"{wait}, or use another run name")


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


def _may_take(holder: Lease | None, machine: str) -> bool:
    return (
        holder is None
        or holder.machine == machine
        or holder.until <= time.time()
        or _is_known_dead(holder, machine)
    )


def _is_known_dead(holder: Lease, machine: str) -> bool:
    """Whether the holder was a process of this running system (and no other's) that is gone."""
    system = machine.partition("/")[2]
    if not system or holder.machine.partition("/")[2] != system:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _content(machine: str) -> bytes:
    until = time.time() + LEASE_SECONDS
    holder = Lease(machine=machine, host=socket.gethostname(), pid=os.getpid(), until=until)
    return holder.model_dump_json().encode()


def _read(store: Store, name: str) -> Lease | None:
    return _parsed(Version(store.read(name)))


def _parsed(found: Version) -> Lease | None:
    try:
        return None if found.content is None else Lease.model_validate_json(found.content)
    except ValidationError:
        return None


def _machine(store: Store) -> str:
    """Name of this machine's mirror, drawn once, and of the system that runs now, where it has a name."""
    path = store.local / ".machine"
    write_once(path, secrets.token_hex(8))
    return f"{path.read_text().strip()}/{_system()}"


def _system() -> str:
    """What processes share whose ids mean the same: this start of the system, and the space of its process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""
