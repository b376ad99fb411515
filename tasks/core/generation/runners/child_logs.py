"""What a child process logs, told again by its parent, whose handlers know where to show it."""

from __future__ import annotations

import logging
import logging.handlers
import pickle
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext

# The logger above all of this project's.
_TOP_LOGGER = "tasks"
_LAST_LINES_SECONDS = 5


@dataclass(frozen=True, slots=True)
class LogsToParent:
    """Given to a child, which calls `begin` before its work; what is below `level` is not sent."""

    connection: Connection
    level: int

    def begin(self) -> None:
        """Send all that this process logs from now on."""
        top = logging.getLogger(_TOP_LOGGER)
        top.addHandler(_Sender(self.connection))
        top.setLevel(self.level)


class _Sender(logging.handlers.QueueHandler):
    """Sends records as finished text, which can be pickled; the parent's handlers give them their form."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(queue.SimpleQueue())  # not used
        self._connection = connection

    def enqueue(self, record: logging.LogRecord) -> None:
        self._connection.send(record)


@contextmanager
def told_again(context: SpawnContext) -> Iterator[LogsToParent]:
    """Log here, under the same names, what a child that is started in the block sends until its end."""
    receiver, sender = context.Pipe(duplex=False)
    # In a copy of the context, so that Prefect's handler finds the run that the lines belong to.
    arguments = (_tell_again, receiver)
    thread = threading.Thread(target=copy_context().run, args=arguments, name="child-logs", daemon=True)
    thread.start()
    try:
        yield LogsToParent(sender, logging.getLogger(_TOP_LOGGER).getEffectiveLevel())
    finally:
        sender.close()  # the child's end is closed by its own
        thread.join(_LAST_LINES_SECONDS)


def _tell_again(receiver: Connection) -> None:
    with receiver:
        while True:
            try:
                record = receiver.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                return
            target = logging.getLogger(record.name)
            if target.isEnabledFor(record.levelno):
                target.handle(record)
