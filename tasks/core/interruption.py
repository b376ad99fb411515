"""An end of the work that no library can swallow and that reaches threads too.

A KeyboardInterrupt raised inside a library's callback, or cancelled away by an event loop, would be lost and the work
would go on; and a signal reaches the main thread only. The request is therefore remembered, and long loops ask for it
after each row or step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()
_ending = threading.Event()


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Remember Ctrl-C inside the block, where it raises KeyboardInterrupt as usual; nothing off the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


@contextmanager
def interruptible_threads() -> Iterator[Callable[[], None]]:
    """Give what interrupts the work of this process's threads until the block ends, which should wait for them."""
    try:
        yield _ending.set
    finally:
        _ending.clear()


def is_interrupted() -> bool:
    """Tell whether Ctrl-C was pressed or the threads are to end."""
    return _asked.is_set() or _ending.is_set()


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if the work is to end; call it in the loop of a long piece of work."""
    if is_interrupted():
        raise KeyboardInterrupt


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
