"""Children of `multiprocessing` that begin with the libraries loaded, where the code under test spawns them.

They are warm programs (python.py), not children of the test process to the system; to `multiprocessing` they are.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing import popen_spawn_posix, util
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess
from types import SimpleNamespace
from typing import Any

import pytest

from tests.making.warm.descendants import without_own_flags
from tests.making.warm.python import WarmPython, fits


class _WarmPopen(popen_spawn_posix.Popen):
    _program: WarmPython | None = None

    def _launch(self, process_obj: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                popen_spawn_posix, "util", SimpleNamespace(**{**vars(util), "spawnv_passfds": self._start})
            )
            super()._launch(process_obj)  # type: ignore[misc]

    def _start(self, path: bytes, args: Sequence[Any], passed: Sequence[int]) -> int:
        if not fits(os.environ):
            return util.spawnv_passfds(path, args, passed)
        command = without_own_flags([os.fsdecode(argument) for argument in args])
        self._program = WarmPython(command[1:], env=os.environ, streams=(0, 1, 2), passed=sorted(set(passed)))
        return self._program.pid

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
