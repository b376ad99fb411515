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
_NOTHING_YET = "nothing was begun yet"
_SAME_COMMAND = "the same command"

_kept: Callable[[], str] = lambda: _NOTHING_YET  # noqa: E731
_way_on = _SAME_COMMAND
_last_signal: signal.Signals | None = None


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Remember Ctrl-C and SIGTERM inside the block, where both raise KeyboardInterrupt; main thread only.

    Off the main thread, where signals cannot be heard, the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        forget()


def remember() -> None:
    """Ask all work of this process to end, as Ctrl-C does; any thread may call it."""
    _asked.set()


def forget() -> None:
    """Begin anew: no request to end, nothing kept."""
    _asked.clear()
    keeps(lambda: _NOTHING_YET)
    goes_on_by(_SAME_COMMAND)


@contextmanager
def interruptible_threads() -> Iterator[Callable[[], None]]:
    """Give what interrupts the work of this process's threads until the block ends, which should wait for them."""
    try:
        yield _ending.set
    finally:
        _ending.clear()


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """Processes begun inside the block never hear the terminal's Ctrl-C: who began them also ends them.

    A terminal signals the whole process group; each child would print a traceback of its own. The blocked signal is
    inherited, and here it waits until the block ends. Works on any thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_interrupted() -> bool:
    """Tell whether Ctrl-C was pressed or the threads are to end."""
    return _asked.is_set() or _ending.is_set()


def last_signal() -> signal.Signals | None:
    """The last signal that became a KeyboardInterrupt in this process; `forget` leaves it."""
    return _last_signal


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if the work is to end; call it in the loop of a long piece of work."""
    if is_interrupted():
        raise KeyboardInterrupt


def keeps(describe: Callable[[], str]) -> None:
    """From now on `describe` says what is kept if the work is interrupted; it is called at that moment."""
    global _kept
    _kept = describe


def goes_on_by(way_on: str) -> None:
    """From now on an interrupted piece of work goes on by this, which is `the same command` unless it is told."""
    global _way_on
    _way_on = way_on


def way_on() -> str:
    """What makes an interrupted piece of work go on."""
    return _way_on


def what_is_kept() -> str:
    """Say what an interrupted command keeps and how to go on, in one sentence without a capital and full stop."""
    return _kept()


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _last_signal
    _last_signal = signal.Signals(number)
    _asked.set()
    raise KeyboardInterrupt
