"""Children of `multiprocessing` that begin with the libraries loaded, where the code under test spawns them.

They are warm programs (python.py), not children of the test process to the system; to `multiprocessing` they are.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess, set_spawning_popen
from typing import Any

import pytest

from tests.making.warm.descendants import without_own_flags
from tests.making.warm.python import WarmPython, fits


class _WarmPopen(popen_spawn_posix.Popen):
    _program: WarmPython | None = None
    sentinel: int

    def _launch(self, process_obj: Any) -> None:
        """As the parent class does; what it starts an interpreter with is of all threads and cannot be replaced."""
        if not fits(os.environ):
            super()._launch(process_obj)  # type: ignore[misc]
            return
        tracker = resource_tracker.getfd()
        given = io.BytesIO()
        set_spawning_popen(self)
        try:
            for part in (spawn.get_preparation_data(process_obj.name), process_obj):
                reduction.dump(part, given)
        finally:
            set_spawning_popen(None)
        (self.sentinel, held), (to_read, wanted) = os.pipe(), os.pipe()
        # What is written to stays open: the child sees by it that this process lives.
        self.finalizer = util.Finalize(self, util.close_fds, (self.sentinel, wanted))  # type: ignore[attr-defined]
        try:
            command = without_own_flags(spawn.get_command_line(tracker_fd=tracker, pipe_handle=to_read))
            passed = sorted({*self._fds, tracker, to_read, held})  # type: ignore[attr-defined]
            self._program = WarmPython(command[1:], env=os.environ, streams=(0, 1, 2), passed=passed)
            self.pid = self._program.pid
            with os.fdopen(wanted, "wb", closefd=False) as stream:
                stream.write(given.getbuffer())
        finally:
            os.close(held)
            os.close(to_read)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self._program is None:
            return super().poll(flag)
        if self.returncode is None:
            self.returncode = self._program.poll() if flag == os.WNOHANG else self._program.wait()
        return self.returncode


class _WarmProcess(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        return _WarmPopen(process_obj)


class _WarmContext(SpawnContext):
    Process = _WarmProcess


@pytest.fixture
def warm_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `multiprocessing.get_context("spawn")` begin children that have the libraries loaded."""
    warm = _WarmContext()
    plain: Callable[..., BaseContext] = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: warm if method == "spawn" else plain(method)
    )
