"""Work in a child process that may die: the parent sees how, and lives.

Native code can end a process in ways that no `except` catches: the kernel's out-of-memory killer, a failed
assertion in a kernel library, a segmentation fault after a failed allocation. The child is spawned, never
forked (a fork hangs with torch's threads).
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

from tasks.core.children import LogsToParent, end_with_parent, portable, told_again
from tasks.core.errors import TuneproofError
from tasks.core.interruption import unheard_by_children

logger = logging.getLogger(__name__)
Argument = TypeVar("Argument")
_POLL_SECONDS = 0.2


class ChildDiedError(TuneproofError):
    """The generating process ended, not for lack of memory, without an error that can be raised here."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The exception that ended the child's work."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a child ended. `exit_code` is negative for a signal, as in multiprocessing."""

    exit_code: int
    killed_for_memory: bool

    @property
    def cause(self) -> str:
        """The signal's name, or the exit code."""
        if self.exit_code < 0:
            return f"signal {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"

    @property
    def may_be_memory(self) -> bool:
        """Whether the death can be one for lack of memory: certain, or a native crash that often is one."""
        crashes = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        return self.killed_for_memory or -self.exit_code in crashes or self.exit_code > 0


def is_isolated(isolation: Literal["auto", "none", "process"], device: str) -> bool:
    """Tell whether generation on `device`, as it stands in the settings, belongs into a child process.

    `auto` takes one for CUDA, where native deaths are most likely and only an ended process gives all memory back.
    """
    if isolation != "auto":
        return isolation == "process"
    from tasks.core.models.placement import choose_device

    return choose_device(device).startswith("cuda")


def run_in_child(
    work: Callable[[Connection, Argument], None],
    argument: Argument,
    on_message: Callable[[Any], None],
    stopped: Callable[[], bool] | None = None,
) -> ChildEnd | None:
    """Run `work(connection, argument)` in a spawned process; what it sends goes to `on_message`.

    What it logs is logged here, under the same names. Returns None when it ended well, a ChildEnd when it died.
    Raises what the work raised. When the parent is interrupted or killed, or `stopped` says so, the child ends too.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    kills_before = _memory_kills()
    with told_again(context) as logs, receiver:
        child = context.Process(target=_run, args=(sender, logs, work, argument), name="tuneproof-generation")
        with unheard_by_children():
            child.start()
        sender.close()
        try:
            failure = _listen(receiver, child, on_message, stopped)
            child.join()
        finally:
            _end(child)
    if failure is not None:
        raise failure
    exit_code = child.exitcode or 0
    if exit_code == 0:
        return None
    killed = exit_code == -signal.SIGKILL and _memory_kills() > kills_before
    return ChildEnd(exit_code, killed_for_memory=killed)


def _listen(
    receiver: Connection,
    child: BaseProcess,
    on_message: Callable[[Any], None],
    stopped: Callable[[], bool] | None,
) -> BaseException | None:
    """Hand on what the child sends until it is gone; return the error that it sent, if any."""
    failure: BaseException | None = None
    while True:
        try:
            while stopped is not None and not receiver.poll(_POLL_SECONDS):
                if stopped():
                    child.terminate()
            message = receiver.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return failure
        if isinstance(message, Failed):
            failure = message.error
        else:
            on_message(message)


def _end(child: BaseProcess) -> None:
    if child.is_alive():
        child.terminate()
        child.join(10)
        if child.is_alive():
            child.kill()
            child.join()


def _run(
    connection: Connection,
    logs: LogsToParent,
    work: Callable[[Connection, Argument], None],
    argument: Argument,
) -> None:
    end_with_parent()
    logs.begin()
    try:
        work(connection, argument)
    except BaseException as exc:  # travels to the parent, which raises it
        connection.send(Failed(portable(exc, ChildDiedError)))
    finally:
        connection.close()


def _memory_kills() -> int:
    """How often the kernel's out-of-memory killer has struck so far, here or on the machine; 0 if unknown."""
    counters = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")]
    kills = 0
    for path in counters:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name in ("oom_kill", "oom_group_kill"):
                kills += int(value)
    return kills
