"""What a child process has of its parent: its logs are told there again, and it ends when its parent does.

The parent's handlers know where to show a log line.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import pickle
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext

from tasks.core.errors import TuneproofError

logger = logging.getLogger(__name__)

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


def end_with_parent() -> None:
    """See to it that this process ends at once when its parent does; a killed parent cannot end its child itself.

    An orphan would go on to hold the run directory and the device that a retry of the parent needs.
    """
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def portable(error: BaseException, otherwise: type[TuneproofError] = TuneproofError) -> BaseException:
    """Return `error` if it arrives whole in another process, else an `otherwise` with its type and message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception as exc:  # whatever the code of some library's error raises
        logger.debug("%s cannot be pickled: %s", type(error).__name__, exc)
    return otherwise(f"the process ended with {type(error).__name__}: {error}")
