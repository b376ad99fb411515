"""Every file-system call: killed at it, or told by the system that the disk is full, read-only or broken.

strace meets the calls of a forked process for real. A first run lists the calls that touch the place; then each of
them (in a short run: some, chosen by the seed) is met by each fault, and the same command must go on to the end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import SHORT_WORKS, Stage, Work, last_line, told_harm
from bench.torture_parts.trials import Clock, Ended, Harm, Tally, by_turns, source_of

PART = "calls"
WRITING = (
    "openat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat2", "link", "linkat", "unlink",
    "unlinkat", "mkdir", "ftruncate", "rmdir",
)  # fmt: skip
FAULTS = ("KILL", "ENOSPC", "EROFS", "EIO")
_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)")
_ATTACH_SECONDS = 10.0


@dataclass(frozen=True, slots=True, order=True)
class Call:
    """The `count`-th call of that name in a thread, which touched `path`."""

    name: str
    count: int
    path: str


def why_not() -> str | None:
    """Say why calls cannot be met here, or None."""
    if shutil.which("strace") is None:
        return "needs strace, which is not installed (Debian, Ubuntu: apt-get install strace)"
    with tempfile.TemporaryDirectory() as folder:
        tried = ["strace", "-o", f"{folder}/log", "-e", "inject=fsync:error=EIO:when=1", "true"]
        done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"strace may not trace here: {done.stderr.strip()[:100]}"


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Meet the calls of all works until all were met or the time is up; one row for each work."""
    if (reason := why_not()) is not None:
        yield Row("file-system calls", "skipped", reason, part=PART)
        return
    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=6),
    )
    names = SHORT_WORKS if bench.tiny else tuple(stage.works)
    waiting = {name: _trials(stage, stage.works[name]) for name in names}
    there = {name: len(trials) for name, trials in waiting.items()}
    tallies = {name: Tally(PART, name) for name in waiting}
    for name, (call, fault) in by_turns(waiting, clock, source):
        met, harm = _met(stage, stage.works[name], call, fault)
        what = f"{fault} at {call.name} {call.count} of {Path(call.path).name}"
        tallies[name].count(harm, faults=met, what=what)
    for name, tally in tallies.items():
        yield tally.row(f"{there[name] - len(waiting[name])} of {there[name]} calls and faults met")


def _trials(stage: Stage, work: Work) -> list[tuple[Call, str]]:
    return [(call, fault) for call in calls_of(stage, work) for fault in FAULTS if _makes_sense(call, fault)]


def _makes_sense(call: Call, fault: str) -> bool:
    """A disk that is full lets files go, and a broken one is as good as full for most calls."""
    if fault == "ENOSPC":
        return call.name not in ("unlink", "unlinkat", "rmdir", "ftruncate")
    return fault != "EIO" or call.name in ("write", "pwrite64", "fsync", "fdatasync")


def calls_of(stage: Stage, work: Work) -> list[Call]:
    """Return the calls of an undisturbed work that touch the place, as strace sees them."""
    stage.expected(work)
    stage.fresh(work)
    trace_path = stage.folder / "trace"
    stage.run(work, waits=True, meanwhile=_Tracer(trace_path, ["-y", "-e", f"trace={','.join(WRITING)}"]))
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, int], Call] = {}
    for line in trace_path.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, name, rest = match.groups()
        counts[thread, name] += 1
        number = counts[thread, name]
        path = re.search(rf"[<\"]({re.escape(str(stage.place))}/[^>\"]*)", rest)
        if path is not None and not (name == "openat" and "O_CREAT" not in rest):
            found[name, number] = Call(name, number, path[1])
    return sorted(found.values())


def _met(stage: Stage, work: Work, call: Call, fault: str) -> tuple[int, Harm]:
    """Let one call of a work meet a fault; the same command then ends it. Gives whether it met, and the harm."""
    stage.fresh(work)
    trace_path = stage.folder / "trace"
    how = "signal=KILL" if fault == "KILL" else f"error={fault}"
    options = ["-e", f"trace={call.name}", "-e", f"inject={call.name}:{how}:when={call.count}"]
    ended = stage.run(work, waits=True, meanwhile=_Tracer(trace_path, options))
    traced = trace_path.read_text(errors="replace")
    met = int("(INJECTED)" in traced or "killed by SIGKILL" in traced)
    harm = told_harm(ended)
    if ended.is_refusal and not work.refused:
        harm.add(_untrue(stage, work, ended))
    if works.is_done(work, stage.place, stage.expected(work)):
        return met, harm  # it was done; nobody gives a finished command again
    if harm.hung:
        return met, harm
    again = stage.run(work)
    harm.add(stage.after(work, again))
    return met, harm


def _untrue(stage: Stage, work: Work, ended: Ended) -> Harm:
    """A command that says it failed has not moved the alias, or says that it did."""
    if work.name not in ("promote", "rollback"):
        return Harm()
    expected = stage.expected(work)["pointer"]
    moved = work.final(stage.place)["pointer"] == expected
    if moved and f"{expected} is" not in ended.told:
        return Harm(silently_wrong=1, notes=[f"the alias moved though it said: {last_line(ended)}"])
    return Harm()


class _Tracer:
    """Attaches strace to a process that waits, and lets it go on."""

    def __init__(self, trace_path: Path, options: list[str]) -> None:
        self._trace_path, self._options = trace_path, options

    def __call__(self, child: int) -> None:
        self._trace_path.unlink(missing_ok=True)
        tracer = subprocess.Popen(
            ["strace", "-f", "-p", str(child), "-o", str(self._trace_path), *self._options],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert tracer.stderr is not None
        started = time.monotonic()
        while b"attached" not in tracer.stderr.readline():
            if tracer.poll() is not None or time.monotonic() > started + _ATTACH_SECONDS:
                break
        os.kill(child, signal.SIGCONT)
        self._tracer = tracer  # ends with the process
