"""Progress of a long step, shown where it is looked for: the Prefect UI, and a terminal or the log."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context

from tasks.ui.artifacts import ProgressArtifact
from tasks.ui.terminal_bar import Show, terminal_bar

logger = logging.getLogger(__name__)

_LOG_EVERY_PERCENT = 10


@contextmanager
def shown_progress(what: str, run_name: str) -> Iterator[Show]:
    """Give a function that shows progress in the UI and on the terminal; call it within a task.

    The function may be called from any thread: what it shows belongs to the run in which it was given.
    """
    artifact = ProgressArtifact(f"{what}-{run_name}", f"{what} of {run_name}")
    with terminal_bar(what) if sys.stderr.isatty() else _log_lines(what) as on_terminal:
        context, lock = copy_context(), threading.Lock()

        def show_in_run(done: float, total: float, text: str) -> None:
            artifact.show(done, total, text)
            on_terminal(done, total, text)

        def show(done: float, total: float, text: str) -> None:
            with lock:  # a context is entered by one thread at a time
                context.run(show_in_run, done, total, text)

        yield show


@contextmanager
def _log_lines(what: str) -> Iterator[Show]:
    next_percent = float(_LOG_EVERY_PERCENT)

    def show(done: float, total: float, text: str) -> None:
        nonlocal next_percent
        percent = 100 * done / total if total else 100.0
        if percent >= next_percent:
            logger.info("%s: %d %%, %s", what, percent, text)
            next_percent = (percent // _LOG_EVERY_PERCENT + 1) * _LOG_EVERY_PERCENT

    yield show
