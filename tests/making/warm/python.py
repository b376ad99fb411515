"""Python programs in processes of their own that begin with torch, transformers and Prefect loaded.

A new interpreter takes seconds to import them. These are forked from one that has done so, the same for all test
processes that run side by side. They have their own process id, folder, environment, streams and signals, import this
project anew, and end as any other. A test of what is imported, or of the start itself, starts `sys.executable`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from filelock import FileLock

from tests.making.warm.descendants import (
    READ_ONCE,
    REQUEST_BYTES,
    ROOM_FOR_ARGUMENTS,
    ROOM_FOR_ENVIRONMENT,
    ignored_signals,
)

ROOT = Path(__file__).resolve().parents[3]
# In which the libraries are loaded; a test may change its own.
_LOADED_IN = dict(os.environ)
_UNHEARD = ignored_signals()
_ASKING = threading.Lock()


class WarmPython:
    """A running program; `pid`, `poll`, `wait`, `send_signal` and `returncode` are those of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | str | None = None,
        streams: tuple[int, int, int],
        new_session: bool = False,
        terminal: bool = False,
        warm_children: bool = False,
        passed: Sequence[int] = (),
    ) -> None:
        """Start `python ARGUMENTS`: -m MODULE, -c CODE or a file; `terminal` makes the streams its terminal.

        With `warm_children` all Python programs that come of it begin with the libraries loaded (descendants.py).
        It has the descriptors `passed` too, under their numbers here, and hears no signal that this process has come to
        ignore; what it ignored from the start, as a background job of some shells does, tells nothing.
        """
        assert fits(env), "start a new interpreter"
        self.args = [sys.executable, *arguments]
        self.returncode: int | None = None
        request = {
            "arguments": list(arguments), "cwd": str(cwd or Path.cwd()), "environment": dict(env),
            "new_session": new_session, "terminal": terminal, "warm_children": warm_children,
            "passed": list(passed), "ignored": [number for number in ignored_signals() if number not in _UNHEARD],
        }  # fmt: skip
        self._told, writer = os.pipe()
        weakref.finalize(self, os.close, self._told)
        self._hearing = threading.Lock()
        with _ASKING:
            socket.send_fds(_server()[0], [json.dumps(request).encode()], [*streams, *passed, writer])
        os.close(writer)
        self.pid = int(self._told_number())

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, which is not told yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            with self._hearing:  # another thread may wait for it too
                if self.returncode is None:
                    self.returncode = self._told_number()
        return self.returncode

    def _told_number(self) -> int:
        line = bytearray()
        while (byte := os.read(self._told, 1)) not in (b"\n", b""):
            line += byte
        if not line:
            raise RuntimeError(f"the process that forks programs has ended: {_server()[1].read_text()}")
        return int(line)


def run_python(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float = 300,
    check: bool = False,
    warm_children: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end, as `subprocess.run` with captured text and no input does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open() as nothing:
        streams = (nothing.fileno(), out.fileno(), err.fileno())
        given = os.environ if env is None else env
        program = WarmPython(arguments, env=given, cwd=cwd, streams=streams, warm_children=warm_children)
        try:
            code = program.wait(timeout)
        except BaseException:
            program.kill()
            raise
        told = []
        for stream in (out, err):
            stream.seek(0)
            told.append(stream.read().decode().replace("\r\n", "\n"))
    done = subprocess.CompletedProcess(program.args, code, *told)
    if check:
        done.check_returncode()
    return done


def start_with_pipes(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path | str | None = None
) -> tuple[WarmPython, IO[str], IO[str]]:
    """Start `python ARGUMENTS`; give it, what it reads and what it prints. Its errors go where ours go."""
    to_read, wanted = os.pipe()
    printed, to_print = os.pipe()
    try:
        program = WarmPython(arguments, env=env, cwd=cwd, streams=(to_read, to_print, 2))
    finally:
        os.close(to_read)
        os.close(to_print)
    return program, os.fdopen(wanted, "w"), os.fdopen(printed)


def start_in_terminal(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path | str, warm_children: bool = False
) -> tuple[WarmPython, int]:
    """Start `python ARGUMENTS` in a pseudo-terminal; give it and the terminal's descriptor."""
    terminal, inside = pty.openpty()
    try:
        program = WarmPython(
            arguments, env=env, cwd=cwd, streams=(inside,) * 3, terminal=True, warm_children=warm_children
        )
        return program, terminal
    finally:
        os.close(inside)


def fits(environment: Mapping[str, str]) -> bool:
    """Whether a program with this environment may begin with libraries that were loaded in ours."""
    return all(environment.get(name) == _LOADED_IN.get(name) for name in READ_ONCE)


@functools.cache
def _server() -> tuple[socket.socket, Path]:
    """A connection to the process that forks programs, and its log; the first that asks starts it."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"of-{os.getpid()}")
    folder = Path(tempfile.gettempdir()) / f"warm-python-{run}"  # not long: the name of a socket may not be
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        try:
            ours.connect(str(folder / "asked"))
        except OSError:
            _start_server(folder)
            ours.connect(str(folder / "asked"))
    return ours, folder / "log.txt"


def _start_server(folder: Path) -> None:
    """Start the process that forks programs for all who connect; it ends with the last of them and removes `folder`."""
    path = folder / "asked"
    path.unlink(missing_ok=True)
    kept = {
        name: value for name, value in _LOADED_IN.items() if not name.startswith(("PREFECT_", "PYTHONPATH"))
    }
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        (folder / "log.txt").open("wb") as log,
    ):
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "tests.making.warm.server", str(listener.fileno()), str(path)]
        subprocess.Popen(
            [*command, ROOM_FOR_ARGUMENTS],
            env={**kept, "PREFECT_HOME": str(folder / "prefect"), **ROOM_FOR_ENVIRONMENT},
            pass_fds=[listener.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def begin() -> None:
    """Let the libraries be loaded for programs while this process does something else."""
    _server()
