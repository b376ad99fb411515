"""Full disks: a real file system of a few KiB, a limit for the size of a file, a folder that may not be written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import SHORT_WORKS, Stage, Work, told_harm
from bench.torture_parts.trials import Clock, Harm, Tally, source_of

PART = "disks"
_ROOMY = "64m"
_MOST_FREE_BYTES = 600_000
_LARGEST_LIMIT_BYTES = 200_000
_MOST_TOLD_BYTES = 2**20


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Let works meet each kind of disk until the time is up; then the same command must end them."""
    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=1),
    )
    kinds: dict[str, Callable[[Stage, Work, random.Random], Harm]] = {"size limit of a file": _limited}
    if why_no_mount(bench.folder) is None:
        kinds |= {"full file system": _full, "read-only file system": _read_only}
    else:
        yield Row("full file system", "skipped", "mounting a small file system needs root", part=PART)
        if os.geteuid() != 0:
            kinds["read-only folder"] = _read_only_folder
    tallies = {kind: Tally(PART, kind) for kind in kinds}
    names = SHORT_WORKS if bench.tiny else tuple(stage.works)
    turn = source.randrange(len(names))
    while clock.has_turn():
        for kind, met in kinds.items():
            work = stage.works[names[turn % len(names)]]
            stage.expected(work)
            tallies[kind].count(met(stage, work, source), what=work.name)
            turn += 1
    for tally in tallies.values():
        yield tally.row("then ended by the same command")


def why_no_mount(folder: Path) -> str | None:
    """Say why no file system can be mounted here, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "mount-probe"
    target.mkdir(exist_ok=True)
    if not _mount(target, "64k"):
        return "no file system can be mounted"
    _unmount(target)
    return None


def _limited(stage: Stage, work: Work, source: random.Random) -> Harm:
    stage.fresh(work)
    size = int(10 ** source.uniform(1, 5.3))

    # What it says must not meet the limit too, as it would in a file.
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _MOST_TOLD_BYTES)

    def limit() -> None:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(size, _LARGEST_LIMIT_BYTES), resource.RLIM_INFINITY))

    ended = stage.run(work, before=limit)
    os.close(writing)
    os.set_blocking(reading, False)
    with os.fdopen(reading, "rb", buffering=0) as told:
        ended = replace(ended, told=(told.read(_MOST_TOLD_BYTES) or b"").decode(errors="replace"))
    return _ended(stage, work, told_harm(ended))


def _full(stage: Stage, work: Work, source: random.Random) -> Harm:
    with _mounted(stage, work) as place:
        free = source.randrange(_MOST_FREE_BYTES)
        filler_path = place / "filler"
        with filler_path.open("wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"\0" * 65536)
            filler.truncate(max(0, filler.tell() - free))
        harm = told_harm(stage.run(work))
        filler_path.unlink()
        return _ended(stage, work, harm)


def _read_only(stage: Stage, work: Work, source: random.Random) -> Harm:
    with _mounted(stage, work) as place:
        _remount(place, "ro")
        harm = told_harm(stage.run(work))
        _remount(place, "rw")
        return _ended(stage, work, harm)


def _read_only_folder(stage: Stage, work: Work, source: random.Random) -> Harm:
    place = stage.fresh(work)
    folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    harm = told_harm(stage.run(work))
    for folder in folders:
        folder.chmod(0o755)
    return _ended(stage, work, harm)


def _ended(stage: Stage, work: Work, harm: Harm) -> Harm:
    """Give the same command again, unless it had done its work: a second rollback is another one."""
    if works.is_done(work, stage.place, stage.expected(work)):
        return harm
    if not harm.hung:
        harm.add(stage.after(work, stage.run(work)))
    return harm


@contextmanager
def _mounted(stage: Stage, work: Work) -> Iterator[Path]:
    """Have the beginning of a work on a small file system of its own."""
    shutil.rmtree(stage.place, ignore_errors=True)
    stage.place.mkdir()
    if not _mount(stage.place, _ROOMY):
        raise RuntimeError("a file system that could be mounted before cannot be now")
    try:
        shutil.copytree(work.begin, stage.place, dirs_exist_ok=True)
        yield stage.place
    finally:
        _unmount(stage.place)


def _mount(target: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _remount(target: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(target)], check=True, capture_output=True)


def _unmount(target: Path) -> None:
    if subprocess.run(["umount", str(target)], capture_output=True, check=False).returncode:
        subprocess.run(["umount", "-l", str(target)], capture_output=True, check=False)
