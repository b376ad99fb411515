"""Written data forced to the disk at intervals, by a thread, so that writers never wait for the disk."""

from __future__ import annotations

import os
import threading


class PeriodicSync:
    """Forces what was written to an open file to the disk at most `seconds` later.

    A failure is kept and raised by every call after it: what the system could not write once, it may have dropped.
    """

    def __init__(self, descriptor: int, seconds: float) -> None:
        self._descriptor, self._seconds = descriptor, seconds
        self._dirty = False
        self._failure: OSError | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def written(self) -> None:
        """Note that there is something to force. Raises the OSError of an attempt that failed."""
        self._dirty = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="periodic-sync", daemon=True)
            self._thread.start()
        self._raise_failure()

    def force(self) -> None:
        """Force everything now. Raises OSError, of this attempt or an earlier one."""
        self._attempt()
        self._raise_failure()

    def close(self) -> None:
        """End the thread and force what is left. Raises OSError, of this attempt or an earlier one."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._dirty:
            self._attempt()
        self._raise_failure()

    def _repeat(self) -> None:
        while not self._over.wait(self._seconds):
            if self._dirty:
                self._attempt()

    def _attempt(self) -> None:
        self._dirty = False  # before, so that what is written meanwhile counts for the next time
        try:
            os.fsync(self._descriptor)
        except OSError as exc:
            self._failure = exc

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
