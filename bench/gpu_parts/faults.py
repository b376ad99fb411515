"""Checks that fail in the ways a card can make them fail; run only by tests/bench/test_gpu_bench.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from bench.checks.rows import Bench, Check, Row


def _passes(bench: Bench) -> Iterator[Row]:
    yield Row("passes", "passed", "nothing happened")


def _crashes(bench: Bench) -> Iterator[Row]:
    yield Row("before the crash", "measured", "one row came before it", {"rows": 1})
    os.kill(os.getpid(), signal.SIGSEGV)


def _is_killed(bench: Bench) -> Iterator[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Row("is killed", "passed", "unreachable")


def _hangs(bench: Bench) -> Iterator[Row]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (bench.folder / "hanging-child").write_text(str(child.pid))
    time.sleep(600)
    yield Row("hangs", "passed", "unreachable")


def _lacks_a_library(bench: Bench) -> Iterator[Row]:
    import a_library_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    yield Row("lacks a library", "passed", "unreachable")


def _exits(bench: Bench) -> Iterator[Row]:
    os._exit(7)  # as native code does that prints and ends the process
    yield Row("exits", "passed", "unreachable")  # type: ignore[unreachable]  # makes this a generator


CHECKS = (
    Check("crashes", _crashes, 1, 20),
    Check("lacks a library", _lacks_a_library, 1, 20),
    Check("exits", _exits, 1, 20),
    Check("is killed", _is_killed, 1, 20),
    Check("hangs", _hangs, 1, 2),
    Check("passes", _passes, 1, 20),
)
