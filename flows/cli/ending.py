"""How a command ends that is asked to: within seconds, with one line, with its exit code, leaving no process.

Python hands a signal to the main thread when that next runs Python code, and Prefect and other libraries swallow the
exception that it becomes, or wait for something that is gone. So a thread of its own hears the signals too, by the
descriptor that the interpreter writes them to, and ends the process when it has not ended in time.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from tasks.core import interruption
from tasks.core.escaping import visible

GRACE_SECONDS = 7.0
EXIT_SECONDS = 10.0
_KEPT_SECONDS = 1.0
_STOP_SECONDS = 1.0
# What a wrapper and the terminal send at once is one wish, not two.
_IMPATIENT_SECONDS = 0.5
_ASKS_TO_END = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_WARNINGS = "PYTHONWARNINGS"
_LEFT_SEMAPHORES = "ignore:resource_tracker:UserWarning"
_SHOW_CURSOR = "\x1b[?25h"


def run_to_end(work: Callable[[], int]) -> int:
    """Run the command that is this process's only purpose, on the main thread; give its exit code.

    After Ctrl-C (130) or SIGTERM (143) the process ends here, its descendants too; a second Ctrl-C ends it at once.
    A signal that comes when the work is done comes too late: the code is that of the work.
    """
    ending, code = _Ending(), None
    try:
        with interruption.remembered_interrupts(), ending.heard_by_thread(), _interrupts_untold():
            try:
                code = work()
            except BaseException as error:
                # Asked to end, the work may raise anything on its way out.
                if not isinstance(error, KeyboardInterrupt) and not interruption.is_interrupted():
                    raise
                ending.end_process()
    except KeyboardInterrupt:  # while the handlers were set, or put back
        if code is None:
            ending.end_process()
    assert code is not None
    return code


def exit_in_time(code: int) -> NoReturn:
    """Exit with this code, and end the process if that takes too long; for a process that only runs one command.

    At its exit Prefect sends what logs and events wait, for minutes where the server is away. Who is asked to end
    meanwhile ends at once; nothing is told of it, since the work is done.
    """

    def end_now(*_: object) -> NoReturn:
        _end_descendants()
        os._exit(code)

    def end_later() -> None:
        time.sleep(EXIT_SECONDS)
        end_now()

    if threading.current_thread() is threading.main_thread():
        for number in _ASKS_TO_END:
            signal.signal(number, end_now)
    threading.Thread(target=end_later, name="exit-in-time", daemon=True).start()
    gc.freeze()  # the interpreter's last collection would take seconds to walk all that the libraries made
    sys.exit(code)


@contextmanager
def _interrupts_untold() -> Iterator[None]:
    """Let Python print nothing of an interrupt that meets a finaliser or a thread, where it cannot be raised on.

    Nor of what else goes wrong there on the way to the end. The request is remembered all the same. Semaphores of a
    process that ends at once are tidied by Python's tracker, a process begun with the first of them: it keeps quiet.
    """
    warned_of = os.environ.get(_WARNINGS)
    os.environ[_WARNINGS] = ",".join(filter(None, (warned_of, _LEFT_SEMAPHORES)))
    unraisable, threads = sys.unraisablehook, threading.excepthook

    def is_told(kind: type[BaseException] | None) -> bool:
        return not interruption.is_interrupted() and not issubclass(kind or Exception, KeyboardInterrupt)

    def tell_unraisable(args: sys.UnraisableHookArgs) -> None:
        if is_told(args.exc_type):
            unraisable(args)

    def tell_of_thread(args: threading.ExceptHookArgs) -> None:
        if is_told(args.exc_type):
            threads(args)

    sys.unraisablehook, threading.excepthook = tell_unraisable, tell_of_thread
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = unraisable, threads
        if warned_of is None:
            os.environ.pop(_WARNINGS, None)
        else:
            os.environ[_WARNINGS] = warned_of


class _Ending:
    """The signal that asked for the end, and what then happens."""

    def __init__(self) -> None:
        self._number: signal.Signals | None = None
        self._lock = threading.Lock()

    @contextmanager
    def heard_by_thread(self) -> Iterator[None]:
        """Let a thread hear the signals inside the block."""
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="ending", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.close()

    def _listen(self, reader: socket.socket) -> None:
        """Hear signals; end the process when its time is up. Ends when the other end is closed."""
        first: float | None = None
        while True:
            left = None if first is None else max(0.0, first + GRACE_SECONDS - time.monotonic())
            if not select.select([reader], [], [], left)[0]:
                self.end_process()
            numbers = reader.recv(64)
            if not numbers:
                return
            for number in numbers:
                if number not in _ASKS_TO_END:
                    continue
                if first is None:
                    self._number, first = signal.Signals(number), time.monotonic()
                    interruption.remember()
                elif number == signal.SIGINT and time.monotonic() > first + _IMPATIENT_SECONDS:
                    self.end_process()

    def end_process(self) -> NoReturn:
        """Say what is kept, end the descendants and this process, whatever its other threads do."""
        if threading.current_thread() is threading.main_thread():
            for number in _ASKS_TO_END:  # once more would be a traceback
                signal.signal(number, lambda *_: None)
        with self._lock:  # never released: one thread ends the process
            asked = self._number or interruption.last_signal() or signal.SIGINT
            how = "interrupted" if asked == signal.SIGINT else f"ended by {asked.name}"
            with suppress(OSError, ValueError):
                if threading.current_thread() is threading.main_thread():
                    sys.stdout.flush()
                cursor = _SHOW_CURSOR if os.isatty(_STDERR) else ""
                # Past Python's stream, whose lock the main thread may hold.
                os.write(_STDERR, f"{cursor}\n{how}: {visible(_told_in_time())}\n".encode(errors="replace"))
            _end_descendants()
            os._exit(128 + asked)


def _told_in_time() -> str:
    """What is kept; counting it must not hold up the end."""
    told: list[str] = []

    def tell() -> None:
        with suppress(Exception):
            told.append(interruption.what_is_kept())

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(_KEPT_SECONDS)
    return told[0] if told else f"finished rows are kept; {interruption.way_on()} goes on"


def _end_descendants() -> None:
    """End every process that this one began and that is still there."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "resource_tracker" not in " ".join(process.cmdline()):  # it tidies up and ends by itself
                process.terminate()
                found.append(process)
    for process in psutil.wait_procs(found, timeout=_STOP_SECONDS)[1]:
        with suppress(psutil.Error):
            process.kill()
