"""What a person at the terminal sees: our own messages, plain; Prefect's only where something is wrong."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TextIO

from tasks.core.errors import StorageError, TuneproofError
from tasks.core.escaping import visible

_UNWATCHED_WIDTH = 160
_MOST_STYLED_ROWS = 200
TOLD_BY_COMMAND = {"told_by_command": True}
"""`extra` of a message for a run's log that the command prints itself when the run is done."""
# Columns that are not folded on a narrow terminal.
_KEPT_WHOLE = frozenset({"metric", "before", "after", "score", "rows", "last loss", "finished"})
_OWN_LOGGERS = ("tasks", "flows")
_PREFECT_TRANSPORT = (
    "prefect.events",
    "prefect._internal",
    "prefect.concurrency",
    "EventsWorker",
    "APILogWorker",
)
_RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
# Read by these libraries when they are imported, which is later.
_QUIET_LIBRARIES = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_MAY_NOT_WRITE = (
    "take a folder in which you may write (pipeline.models_dir, pipeline.runs_dir), or change its rights"
)
_BROKEN_PLACE = "the disk or the network drive has a fault: see what it says, then run the same command again"
_PLACES_TO_MEND = {
    errno.EIO: _BROKEN_PLACE,
    errno.ESTALE: _BROKEN_PLACE,
    errno.EFBIG: "a file may not become so large here (ulimit -f): raise that limit, or take another disk",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n), then run the same command again",
    errno.EACCES: _MAY_NOT_WRITE,
    errno.EPERM: _MAY_NOT_WRITE,
    errno.EROFS: _MAY_NOT_WRITE,
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.ENAMETOOLONG: "give a shorter name: the file system takes no more than 255 characters",
    errno.ENOTDIR: "a part of this path is a file and no folder: correct the path",
    errno.EISDIR: "this is a folder and no file: correct the path",
}
_ENDLESS_WORD = re.compile(r"\S{400,}")
_SHOWN_OF_WORD = 120
_ENGINE_FOLDER = f"{os.sep}prefect{os.sep}"


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment, so that progress bars can step aside."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.addFilter(is_worth_showing)
        self.setFormatter(_PlainFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return visible(f"{level}{record.getMessage()}")


def is_worth_showing(record: logging.LogRecord) -> bool:
    """Show our messages, and warnings of others; not Prefect's running commentary on its runs.

    An exception that ends a run reaches the command line anyway and is reported there once.
    """
    if getattr(record, next(iter(TOLD_BY_COMMAND)), False):
        return False
    if record.name.startswith(_RUN_LOGGERS):
        from_engine = _ENGINE_FOLDER in record.pathname
        return not from_engine or "Retry" in record.getMessage()
    if record.name.split(".")[0] in _OWN_LOGGERS:
        return True
    if record.name.startswith(_PREFECT_TRANSPORT):
        return False  # that the server is away is told in our words, once
    if record.name.startswith("huggingface_hub"):
        return False  # has a handler of its own
    return record.levelno >= logging.WARNING


def prepare_console() -> None:
    """Send log messages to the terminal; call before Prefect is imported, which then leaves the root alone."""
    # A local server of a few minutes has nothing to report to anybody.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # What it prints whenever an event does not reach its server fills the screen.
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    for variable, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(variable, value)
    warnings.filterwarnings("ignore", category=FutureWarning)  # for the libraries' own makers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that nobody asked for
    logging.raiseExceptions = False  # Prefect would print that a log did not reach its server
    root = logging.getLogger()
    root.handlers = [ConsoleHandler()]
    root.setLevel(logging.WARNING)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)


def unreachable_prefect(error: RuntimeError) -> TuneproofError | None:
    """Explain an error that says Prefect has no server to talk to; None for any other error."""
    text = str(error).partition("\n")[0]
    if text.startswith("Failed to reach API"):
        return TuneproofError(
            f"{text}", "start that server, or unset PREFECT_API_URL to run without one (prefect config view)"
        )
    return None


def unusable_place(error: OSError) -> TuneproofError | None:
    """Explain what a person can mend about a file that the system refuses; None for any other error."""
    next_step = _PLACES_TO_MEND.get(error.errno or 0)
    if next_step is None:
        return None
    return StorageError(f"{error.filename or 'a file'}: {error.strerror}", next_step)


def say(text: str = "") -> None:
    """Print a result line to stdout."""
    print(visible(text), flush=True)


def warn(text: str) -> None:
    """Print a warning about the command itself to stderr."""
    print(visible(f"warning: {text}"), file=sys.stderr, flush=True)


def complain(error: TuneproofError) -> int:
    """Print what happened and what to do next to stderr; return the exit code."""
    told = _ENDLESS_WORD.sub(lambda word: f"{word[0][:_SHOWN_OF_WORD]}…", str(error))
    print(visible(f"error: {told}"), file=sys.stderr, flush=True)
    return error.exit_code


def told_time(moment: datetime) -> str:
    """Give `2026-11-27 13:05`, in the time of this machine."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, of_rows: int = 0
) -> None:
    """Print a table to stdout; `of_rows` are those of all tables, where it is one of several."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Where nobody watches there is no width to fit into.
    width = None if sys.stdout.isatty() else _UNWATCHED_WIDTH
    # Square brackets and colons in a name are no markup.
    console = Console(width=width, markup=False, emoji=False)
    title = visible(title)
    cells = [tuple("" if cell is None else visible(str(cell)) for cell in row) for row in rows]
    if max(len(cells), of_rows) > _MOST_STYLED_ROWS and _show_plainly(title, columns, cells, console.width):
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        keep = column in _KEPT_WHOLE
        table.add_column(column, overflow="fold", no_wrap=keep, min_width=None if keep else 8)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _show_plainly(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], most_characters: int
) -> bool:
    """Print the same table line by line, where no cell must be folded to fit; say whether that was so.

    Styling costs a millisecond a row, which is seconds for a thousand runs.
    """
    from rich.cells import cell_len, set_cell_size

    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    if sum(widths) + 2 * len(widths) + 2 > most_characters or any(
        "\n" in cell for row in rows for cell in row
    ):
        return False

    def line(cells: Sequence[str]) -> str:
        return "  " + "  ".join(map(set_cell_size, cells, widths)).rstrip()

    rule = " " + "─" * (sum(widths) + 2 * len(widths))
    print(title, "", line(columns), rule, *map(line, rows), "", sep="\n")
    return True
