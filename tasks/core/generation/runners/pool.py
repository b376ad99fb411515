"""What a process of the pool does before its first shard: take a seat, and end when its parent does."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event

from tasks.core.generation.runners.seats import Seat
from tasks.core.models.libraries import import_in_child

_CHECK_SECONDS = 0.5
_STOPPED = 3

_seat: Seat | None = None


def own_seat() -> Seat | None:
    """Return the seat of this process; None when it is not of the pool."""
    return _seat


def begin(seats: Queue[Seat], stop: Event) -> None:
    """Initialise a process of the pool; each takes one of the seats."""
    global _seat
    _seat = seats.get()
    threading.Thread(target=_end_with_parent, args=(stop,), name="end-with-parent", daemon=True).start()
    _seat.take()  # before a library may look at the GPUs
    import_in_child()


def _end_with_parent(stop: Event) -> None:
    """End this process when the parent is gone or says stop: shards must not outlive their run.

    Exits at once, in the middle of a batch if need be; finished rows are in the ledger.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not stop.is_set():
        if wait([parent.sentinel], timeout=_CHECK_SECONDS):
            break
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(_STOPPED)
