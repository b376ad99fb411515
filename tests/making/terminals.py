"""A Python program in a terminal of its own, as a person has it: Ctrl-C reaches its whole process group."""

from __future__ import annotations

import os
import select
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.making.warm.python import start_in_terminal

CTRL_C = b"\x03"
_MARK = "COMMAND_IN_TERMINAL"


class Terminal:
    """Runs a command in a pseudo-terminal; knows every process that came of it, whatever its session.

    All of them begin with the libraries loaded, but for those of a command that is to start new interpreters.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        *,
        warm_children: bool = True,
    ) -> None:
        self.output = ""
        self._mark = uuid.uuid4().hex
        marked = {**environment, _MARK: self._mark}
        self._program, self._descriptor = start_in_terminal(
            arguments, env=marked, cwd=folder, warm_children=warm_children
        )
        self.process_id = self._program.pid

    @property
    def exit_code(self) -> int | None:
        return self._program.poll()

    def press_ctrl_c(self) -> None:
        os.write(self._descriptor, CTRL_C)

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.process_id, number)

    def processes(self) -> list[str]:
        """Command lines of all living processes that came of the command."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(_MARK) == self._mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def wait_until(self, happened: Callable[[], bool], seconds: float) -> float:
        """Read what is printed until something has happened; give the seconds that took."""
        began = time.monotonic()
        while not happened():
            assert time.monotonic() - began < seconds, f"it did not happen:\n{self.output}"
            self._read()
        return time.monotonic() - began

    def wait(self, seconds: float) -> float:
        """Wait for the command's end and read the rest of what it printed; give the seconds until the end."""
        took = self.wait_until(self._has_ended, seconds)
        before = -1
        while len(self.output) > before:
            before = len(self.output)
            self._read()
        return took

    def _has_ended(self) -> bool:
        return self.exit_code is not None

    def _read(self) -> None:
        if select.select([self._descriptor], [], [], 0.05)[0]:
            try:
                self.output += os.read(self._descriptor, 65536).decode(errors="replace").replace("\r", "")
            except OSError:  # the command has closed its end
                time.sleep(0.05)

    def close(self) -> None:
        """End whatever is left."""
        os.close(self._descriptor)
        self._program.kill()
        self._program.wait()
