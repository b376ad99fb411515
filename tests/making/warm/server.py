"""Run by python.py: loads the heavy libraries once and becomes, by fork, each Python program that is asked for.

Test processes that run side by side have the same one. Of this project a program finds nothing loaded, and Prefect
reads its settings when the program imports it, as in a new process.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import termios
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.making.warm.descendants import MOST_DESCRIPTORS, REQUEST_BYTES, begin_spare, place, show_as

# Of these an import loads only a door; the rest is loaded at first use.
BEHIND_LAZY_DOORS = {
    "transformers": (
        "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "LlamaForCausalLM", "PreTrainedTokenizerFast",
        "Trainer", "TrainingArguments",
    ),
}  # fmt: skip
PLAIN = (
    "accelerate", "cyclopts", "datasets", "filelock", "httpx", "jinja2", "orjson", "pandas", "peft", "psutil",
    "pydantic", "rich.console", "rich.progress", "rich.table", "safetensors.torch", "scipy.stats", "tenacity", "torch",
)  # fmt: skip
PREFECT = (
    "prefect", "prefect.artifacts", "prefect.assets", "prefect.client.orchestration", "prefect.concurrency.asyncio",
    "prefect.events", "prefect.flow_engine", "prefect.input", "prefect.task_engine", "prefect.task_runners",
    "prefect.utilities.callables",
)  # fmt: skip


def load_libraries() -> None:
    """Import what commands need, and nothing that computes: a process that has computed cannot be forked."""
    for name in PLAIN:
        importlib.import_module(name)
    for name, wanted in BEHIND_LAZY_DOORS.items():
        module = importlib.import_module(name)
        for attribute in wanted:
            getattr(module, attribute)
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    for name in PREFECT:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    sys.meta_path.insert(0, PrefectAsNew())


class PrefectAsNew(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Takes the loaded Prefect away and gives it back at its first import, with the settings of that moment."""

    def __init__(self) -> None:
        names = [name for name in sys.modules if name == "prefect" or name.startswith("prefect.")]
        self._loaded = {name: sys.modules.pop(name) for name in names}
        self._spec = self._loaded["prefect"].__spec__

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "prefect":
            return None
        return importlib.machinery.ModuleSpec("prefect", self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._loaded["prefect"]

    def exec_module(self, module: types.ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__ = self._spec
        sys.modules.update(self._loaded)
        from prefect.context import refresh_global_settings_context
        from prefect.logging import configuration

        refresh_global_settings_context()
        configuration.PROCESS_LOGGING_CONFIG.clear()
        configuration.setup_logging()


@dataclass(frozen=True)
class Program:
    """What stands behind `python` on a command line: -m MODULE, -c CODE or a file, and its arguments."""

    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    new_session: bool = False
    terminal: bool = False
    warm_children: bool = False
    process_group: int | None = None
    passed: list[int] = field(default_factory=list)
    ignored: list[int] = field(default_factory=list)
    blocked: list[int] = field(default_factory=list)

    def settled(self, descriptors: list[int]) -> Program:
        """Have a folder, an environment, streams and signals of one's own.

        Give the program that this process is to run: this one, or one that it has started.
        """
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.new_session or self.terminal:
            os.setsid()
        place(descriptors, [0, 1, 2, *self.passed])
        if self.terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if self.warm_children and (started := begin_spare(LOADED_IN, self.passed)):
            request, given = started
            return Program(**request).settled(given)
        for ignored in self.ignored:
            signal.signal(ignored, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        show_as(self.arguments, self.environment)
        is_unbuffered = bool(self.environment.get("PYTHONUNBUFFERED")) or self.arguments[0] == "-u"
        sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=is_unbuffered)  # type: ignore[union-attr]
        sys.path[1:1] = [part for part in self.environment.get("PYTHONPATH", "").split(os.pathsep) if part]
        return self

    def run(self) -> None:
        is_safe_path = self.arguments[0] == "-P"
        first, *rest = self.arguments[1:] if self.arguments[0] in ("-P", "-u") else self.arguments
        if first == "-m":
            sys.path[0], sys.argv = str(Path.cwd()), rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            code, *given = rest
            sys.path[0], sys.argv = "", ["-c", *given]
            main = types.ModuleType("__main__")
            main.__dict__["__builtins__"] = builtins
            sys.modules["__main__"] = main
            exec(compile(code, "<string>", "exec"), main.__dict__)
        else:
            sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
            if is_safe_path:
                del sys.path[0]
            runpy.run_path(first, run_name="__main__")


def accept(listener: socket.socket, path: Path) -> socket.socket | None:
    """Give the connection of a test process in a process of its own; None in this one when all of those have ended."""
    living = 0
    while True:
        if select.select([listener], [], [], 1.0 if living else None)[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                os.setsid()
                return connection
            connection.close()
            living += 1
        while living and os.waitpid(-1, os.WNOHANG)[0]:
            living -= 1
        if not living:
            path.unlink(missing_ok=True)  # who comes now starts another; who came before is still heard
            if not select.select([listener], [], [], 0)[0]:
                return None


class Server:
    """Forks programs for the process at the other end of a socket; ends with it."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._living: dict[int, int] = {}  # process id: where its exit code is to be told
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def serve(self) -> Program | None:
        """Give a program in each forked process; None in this one when nobody asks any more."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._tell_ends()
            if self._requests in ready:
                message, descriptors, _, _ = socket.recv_fds(self._requests, REQUEST_BYTES, MOST_DESCRIPTORS)
                if not message:
                    return None
                if program := self._fork(Program(**json.loads(message)), descriptors):
                    return program

    def _fork(self, program: Program, descriptors: list[int]) -> Program | None:
        *streams, told = descriptors
        if child := os.fork():
            self._living[child] = told
            _tell(told, child)
            for stream in streams:
                os.close(stream)
            return None
        signal.set_wakeup_fd(-1)
        for end in (self._requests, self._woken, self._waker):
            end.close()
        for descriptor in (told, *self._living.values()):
            os.close(descriptor)
        return program.settled(streams)

    def _tell_ends(self) -> None:
        while self._living:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            told = self._living.pop(child)
            _tell(told, os.waitstatus_to_exitcode(status))
            os.close(told)


def _tell(where: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(where, f"{number}\n".encode())


def run_and_leave(program: Program) -> None:
    """Run it to its end, its threads and exit functions too; taking the loaded libraries apart costs seconds."""
    try:
        program.run()
    except SystemExit as end:
        if isinstance(end.code, int | None):
            _ended_with.append(end.code or 0)
        raise
    _ended_with.append(0)


_ended_with: list[int] = []


def _leave() -> None:
    if _ended_with:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_ended_with[0] & 0xFF)


LOADED_IN = dict(os.environ)

if __name__ == "__main__":
    atexit.register(_leave)  # before those of the libraries, so that it comes last
    load_libraries()
    for ours in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[ours]
    gc.collect()
    gc.freeze()  # so that no collection in a forked process copies what is shared
    socket_path = Path(sys.argv[2])
    requests = accept(socket.socket(fileno=int(sys.argv[1])), socket_path)
    if requests is None:
        shutil.rmtree(socket_path.parent, ignore_errors=True)
        os._exit(0)
    asked = Server(requests).serve()
    if asked is None:
        os._exit(0)
    run_and_leave(asked)
