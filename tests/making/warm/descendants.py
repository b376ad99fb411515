"""Children of a warm program that are warm too, wherever it would start a new interpreter with `subprocess` or spawn.

A program that is to have them begins as two processes: itself, and its spare, which does nothing yet. What the program
starts is forked from the spare and given to the program as its child: it is waited for, killed and watched as any
other, has its session and process group, and shows its own command line and environment to the system. Only a start
that nothing but a new interpreter can serve (other options, an environment that libraries read when they are imported,
COLD in it) is one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Libraries read these when they are imported; a program that is to have others needs a new interpreter.
READ_ONCE = (
    "HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
)
# A start with this variable in its environment is a new interpreter, with all that comes of it.
COLD = "COLD_PYTHON"
REQUEST_BYTES = 1 << 20
# The system shows what stands where a process had its command line and environment when it began.
ROOM_FOR_ARGUMENTS, ROOM_FOR_ENVIRONMENT = " " * (1 << 14), {"ROOM": " " * (1 << 16)}

MOST_DESCRIPTORS = 250

_SET_CHILD_SUBREAPER = 36
# No other user, groups or mask, and no function to call before.
_NOBODY = (None, None, None, -1, None)
_libc = ctypes.CDLL(None)


def begin_spare(
    loaded_in: Mapping[str, str], passed: Sequence[int]
) -> tuple[dict[str, Any], list[int]] | None:
    """Fork the spare; None in the program, which starts interpreters by it from now on.

    In each process that is forked from the spare: the request for it, and its descriptors. The libraries were
    imported in the environment `loaded_in`; the spare has no use for the descriptors that the program was passed.
    """
    ours, spares = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
    if os.fork():
        spares.close()
        _Family(ours, loaded_in).take_starts()
        return None
    for descriptor in (ours.detach(), *passed):
        os.close(descriptor)
    os.setpgid(0, 0)  # not meant by signals to the program's group
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.close(nothing)
    return _serve(spares)


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork what is asked for until the program has ended; give the request in each forked process."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES, MOST_DESCRIPTORS)
        if not message:
            os._exit(0)
        if between := os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            os.waitpid(between, 0)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)  # the program adopts what is forked
        while os.getppid() == between:
            time.sleep(0.0005)
        request = json.loads(message)
        if request.pop("new_session"):
            os.setsid()
        else:
            os.setpgid(0, request["process_group"])
        requests.send(str(os.getpid()).encode())
        requests.close()
        return request, descriptors


class _Family:
    """In the program: its way to its spare, in place of a new interpreter."""

    def __init__(self, spare: socket.socket, loaded_in: Mapping[str, str]) -> None:
        self._spare, self._loaded_in, self._asking = spare, loaded_in, threading.Lock()
        self._session = os.getsid(0)

    def take_starts(self) -> None:
        import _posixsubprocess

        cold, execute = _posixsubprocess.fork_exec, os.execvpe

        def fork_exec(args: Sequence[Any], executables: Sequence[Any], *more: Any) -> int:
            return self._warm(args, executables, *more) or cold(args, executables, *more)

        def execvpe(file: str, args: list[str], env: Mapping[str, str]) -> NoReturn:
            listed = [os.fsencode(f"{name}={value}") for name, value in env.items()]
            streams = (-1,) * 8
            child = self._warm(args, [file], True, (), None, listed, *streams, True, False, -1, *_NOBODY)
            if child is None:
                execute(file, args, env)
            _be_only(child)

        for module, name, warm in (
            (_posixsubprocess, "fork_exec", fork_exec),
            (subprocess, "_fork_exec", fork_exec),
            (os, "execvpe", execvpe),
        ):
            setattr(module, name, warm)

    def _warm(
        self,
        args: Sequence[Any],
        executables: Sequence[Any],
        close_fds: bool,
        kept: Sequence[int],
        cwd: Any,
        env: Sequence[bytes] | None,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        errpipe_read: int,
        errpipe_write: int,
        restore_signals: bool,
        new_session: bool,
        process_group: int,
        *more: Any,
    ) -> int | None:
        """The process id of what is started, as `_posixsubprocess.fork_exec` gives it; None when it must be new."""
        environment = dict(os.environ)
        if env is not None:
            environment = dict(os.fsdecode(entry).split("=", 1) for entry in env)
        command = without_own_flags([os.fsdecode(argument) for argument in args])
        if (
            [os.fsdecode(path) for path in executables] != [sys.executable]
            or not _is_plain(command[1:])
            or not self._fits(environment)
            or process_group >= 0
            or more[:5] != _NOBODY
            or (cwd is not None and not Path(os.fsdecode(cwd)).is_dir())
            or os.getsid(0) != self._session
        ):
            return None
        streams = [given if given >= 0 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        passed = [descriptor for descriptor in kept if descriptor != errpipe_write]
        request = {
            "arguments": command[1:], "cwd": os.fsdecode(cwd) if cwd is not None else str(Path.cwd()),
            "environment": environment, "new_session": new_session, "terminal": False, "warm_children": True,
            "process_group": os.getpgid(0), "passed": passed, "ignored": ignored_signals(),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }  # fmt: skip
        return self._ask(json.dumps(request).encode(), [*streams, *passed])

    def _fits(self, environment: Mapping[str, str]) -> bool:
        return COLD not in environment and all(
            environment.get(name) == self._loaded_in.get(name) for name in READ_ONCE
        )

    def _ask(self, message: bytes, descriptors: list[int]) -> int | None:
        with self._asking:
            _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._spare, [message], descriptors)
                return int(self._spare.recv(64)) or None
            except (OSError, ValueError):  # there is no spare any more
                return None
            finally:
                _libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def without_own_flags(command: list[str]) -> list[str]:
    """`multiprocessing` gives a new interpreter the flags of its own."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [command[0], *command[1 + len(flags) :]] if command[1 : 1 + len(flags)] == flags else command


def _is_plain(arguments: Sequence[str]) -> bool:
    """Whether this is -m MODULE, -c CODE or a file, and worth it: some programs import next to nothing."""
    rest = arguments[1:] if arguments[:1] in (["-P"], ["-u"]) else arguments
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-m", "-c")):
        return False
    return not any("resource_tracker" in argument for argument in rest[:2])


def ignored_signals() -> list[int]:
    return [int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]


def _be_only(child: int) -> NoReturn:
    """What `exec` would have become is a child: hear nothing, end as it ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def place(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Have these descriptors under these numbers, whatever was there."""
    import fcntl

    above = max(numbers) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def show_as(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let the system show this command line and environment; call it when nothing uses those of the start any more."""
    fields = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()
    arguments_begin, arguments_end, environment_begin, environment_end = map(int, fields[45:49])
    entries = [f"{name}={value}" for name, value in environment.items()]
    for begin, end, shown in (
        (arguments_begin, arguments_end, [sys.executable, *arguments]),
        (environment_begin, environment_end, entries),
    ):
        content = b"".join(os.fsencode(part) + b"\0" for part in shown)[: max(0, end - begin - 1)]
        if begin:  # 0 where this is not told
            ctypes.memset(begin, 0, end - begin)
            ctypes.memmove(begin, content, len(content))
