"""The bar that a long step shows on a terminal, and the words for the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Leaves room for the figures on a line of 100 characters.
_BAR_WIDTH = 5


class Show(Protocol):
    """Takes how much is done, of how much, and a word on it."""

    def __call__(self, done: float, total: float, text: str) -> None: ...


@contextmanager
def terminal_bar(what: str) -> Iterator[Show]:
    """Give a function that moves a bar on the terminal while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR_WIDTH),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=None, text="")

        def show(done: float, total: float, text: str) -> None:
            progress.update(bar, completed=done, total=total, text=text)

        yield show


def left_text(eta_seconds: float | None) -> str:
    """Give `1:20 left`, short enough for a bar; nothing where there is nothing to say."""
    if eta_seconds is None or eta_seconds < 1:
        return ""
    minutes, seconds = divmod(round(eta_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f"{clock} left"
