"""Promotions that fail at each file-system call in turn: `python -m tests.making.promotion_faults TEMPLATE WORK`.

Each command runs in a process of its own on a fresh copy of TEMPLATE (a folder of models). At its n-th call that
touches that copy the process is killed ("kill"), or the call fails once ("once"), the disk is full ("full") or gone
("gone") from there on. One JSON line tells what the next use of the alias finds, and what the same command does when it
is run again. `--crowd MODELS SIZE`: SIZE processes change the alias of MODELS at once.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.core.errors import PromotionError, TuneproofError
from tasks.core.models.trained.alias import read_line
from tasks.core.models.trained.champion import current_champion
from tasks.core.promotion.promotion import Actor, promote, roll_back

_PATH_EVENTS = {"open": 0, "os.rename": 1, "os.remove": 0, "os.link": 1, "os.truncate": 0}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NEED_SPACE = ("open", "os.link", "os.fsync")  # os.pwrite has its own way to fail


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


class Fault:
    """Dies, or fails, at the n-th call below a folder."""

    def __init__(self, kind: str, number: int, folder: Path) -> None:
        self.kind, self.number, self.folder, self.count = kind, number, str(folder), 0

    def arm(self) -> None:
        """Watch this process's calls from now on."""
        sys.addaudithook(self._hear)
        for name in ("fsync", "pwrite"):
            setattr(os, name, self._watched(f"os.{name}", getattr(os, name)))

    def _watched(self, event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(descriptor: int, *args: Any) -> Any:
            self._meet(event, _path_of(descriptor))
            if event == "os.pwrite" and self.kind == "full" and self.count >= self.number:
                call(descriptor, bytes(args[0])[:20], args[1])  # a full disk takes a part first
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(descriptor, *args)

        return watched

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _PATH_EVENTS or (event == "open" and not (args[2] or 0) & _WRITING):
            return
        path = args[_PATH_EVENTS[event]]
        if self.kind == "full" and event == "open" and Path(os.fsdecode(path)).exists():
            return  # an open that makes no file needs no space
        self._meet(event, _path_of(path) if isinstance(path, int) else str(path))

    def _meet(self, event: str, path: str) -> None:
        if not path.startswith(self.folder):
            return
        self.count += 1
        if self.kind == "kill" and self.count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        is_gone = self.kind == "gone" and self.count >= self.number
        if is_gone or (self.kind == "once" and self.count == self.number):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.kind == "full" and self.count >= self.number and event in _NEED_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _act(command: str, models_dir: Path) -> None:
    if command == "rollback":
        roll_back(models_dir, Actor("anna"))
    else:
        promote(models_dir, command, Actor("anna", "because"), None, force=True)


def _outcome(command: str, models_dir: Path) -> tuple[int, str]:
    """Give the exit code of the command, and its error."""
    try:
        _act(command, models_dir)
    except TuneproofError as error:
        return 1, str(error)
    except BaseException as error:
        return 2, f"{type(error).__name__}: {error}"
    return 0, ""


def _run(command: str, models_dir: Path, fault: Fault) -> tuple[int, str]:
    """Give the exit code (negative: the signal) of the command in a process of its own, and its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        fault.arm()
        code, told = _outcome(command, models_dir)
        if code == 0 and fault.count < fault.number:
            code = 9
        os.write(writing, told.encode())
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def _holds(models_dir: Path) -> dict[str, Any]:
    """What the next use of the alias finds, and whether pointer and history agree then."""
    try:
        champion = current_champion(models_dir)
        line = read_line(models_dir)
    except TuneproofError as error:
        return {"error": str(error)}
    return {
        "champion": champion and champion.run_name,
        "agree": line.pointer == line.decided,
        "lines": len(line.history.changes),
        "temporary": sorted(path.name for path in models_dir.glob(".*.tmp")),
    }


def main(template: Path, work: Path, commands: list[str]) -> None:
    """Try each command with each kind of fault at each call."""
    once = Path(shutil.copytree(template, work / "once"))
    _outcome(commands[0], once)  # so that no child has more to import
    shutil.rmtree(once)
    gc.freeze()
    for command in commands:
        for kind in ("kill", "once", "full", "gone"):
            for number in range(1, 200):
                models_dir = work / f"{command}-{kind}-{number}"
                shutil.copytree(template, models_dir)
                code, told = _run(command, models_dir, Fault(kind, number, models_dir))
                if code == 9:
                    break
                found: dict[str, Any] = {"command": command, "kind": kind, "number": number}
                found |= {"code": code, "told": told}
                found["held"] = _holds(models_dir)
                if code:
                    found["again"] = _outcome(command, models_dir)
                    found["held_then"] = _holds(models_dir)
                print(json.dumps(found), flush=True)
                shutil.rmtree(models_dir)
            else:
                raise AssertionError(f"{command} made more calls than were tried")


def change_often(models_dir: Path, number: int) -> None:
    """What one of several processes does: promote and roll back in turn."""
    names = ("one", "two", "three")
    for step in range(3):
        try:
            _act("rollback" if (number + step) % 4 == 3 else names[(number + step) % 3], models_dir)
        except PromotionError as error:
            assert "first promoted model" in str(error), error
        found = current_champion(models_dir)
        assert found is not None and found.run_name in names


def crowd(models_dir: Path, size: int) -> None:
    """Let `size` processes change the alias at once; prints their exit codes as one line of JSON."""
    waiting, begin = os.pipe()
    children = []
    for number in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(begin)
            os.read(waiting, 1)  # until all are there
            try:
                change_often(models_dir, number)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    os.close(begin)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    if sys.argv[1] == "--crowd":
        crowd(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
