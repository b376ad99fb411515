"""One trial: a command in a forked process, a fault that meets it, how it ended, and what harm was done."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from bench.checks.rows import Bench, Figures, Outcome, Row

Trial = TypeVar("Trial")

PATIENCE_SECONDS = 90.0
_POLL_SECONDS = 0.005
_SHOWN_NOTES = 4
_ANY_TRACER = ctypes.c_ulong(-1)
_PR_SET_PTRACER = 0x59616D61


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: `code` 128 + N for a signal, None when it hung and was killed; what it printed."""

    code: int | None
    told: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, caught or not."""
        return self.code is not None and self.code >= 128

    @property
    def has_traceback(self) -> bool:
        """Whether a person saw a traceback."""
        return "Traceback (most recent call last)" in self.told

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with 1 or 2 and one message, and nothing worse."""
        errors = [line for line in self.told.splitlines() if line.startswith("error: ")]
        return self.code in (1, 2) and len(errors) == 1 and not self.has_traceback


@dataclass
class Harm:
    """What went wrong in some trials; all of it must be 0."""

    lost: int = 0
    doubled: int = 0
    mixed: int = 0
    silently_wrong: int = 0
    tracebacks: int = 0
    hung: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def any(self) -> bool:
        """Whether anything went wrong."""
        return any(getattr(self, name) for name in HARMS)

    def add(self, other: Harm) -> None:
        """Count another trial's too."""
        for name in HARMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes += other.notes


HARMS = tuple(each.name for each in fields(Harm) if each.name != "notes")


class Tally:
    """The trials of one kind of fault."""

    def __init__(self, part: str, check: str) -> None:
        self._part, self._check, self._started = part, check, time.perf_counter()
        self.trials = self.faults = 0
        self.harm = Harm()

    def count(self, harm: Harm, *, faults: int = 1, what: str = "") -> None:
        """Count one trial; `what` names it where it did harm."""
        self.trials += 1
        self.faults += faults
        if harm.any and what:
            harm.notes = [f"{what}: {note}" for note in harm.notes] or [what]
        self.harm.add(harm)

    def row(self, seen: str = "") -> Row:
        """Return the line of the table."""
        harms: Figures = {name: getattr(self.harm, name) for name in HARMS}
        figures: Figures = {"trials": self.trials, "faults": self.faults, **harms}
        shown = list(dict.fromkeys(self.harm.notes))
        more = [f"and {len(shown) - _SHOWN_NOTES} more"] if len(shown) > _SHOWN_NOTES else []
        bad = "; ".join([*shown[:_SHOWN_NOTES], *more])
        outcome: Outcome = "failed" if self.harm.any else "passed"
        return Row(
            self._check, outcome, bad or seen, figures, time.perf_counter() - self._started, self._part,
            "\n".join(shown),
        )  # fmt: skip


class Clock:
    """A share of the seconds that all checks have together; in a short run some turns, however long they take."""

    def __init__(self, bench: Bench, share: float, short_turns: int) -> None:
        self._end_at = time.monotonic() + bench.seconds * share
        self._turns_left = short_turns if bench.tiny else None

    @property
    def left_seconds(self) -> float:
        """Seconds until the share is used up; below 0 afterwards."""
        return self._end_at - time.monotonic()

    def has_turn(self) -> bool:
        """Whether there is time for another turn, which is then taken."""
        if self._turns_left is None:
            return self.left_seconds > 0
        self._turns_left -= 1
        return self._turns_left >= 0


def by_turns(
    waiting: Mapping[str, list[Trial]], clock: Clock, source: random.Random
) -> Iterator[tuple[str, Trial]]:
    """Give trials of each name in turn, in an order that the seed decides, while there is time; given ones leave."""
    for trials in waiting.values():
        source.shuffle(trials)
    while any(waiting.values()):
        for name, trials in waiting.items():
            if trials:
                if not clock.has_turn():
                    return
                yield name, trials.pop()


def source_of(bench: Bench, part: str) -> random.Random:
    """Return the random numbers of a part, which the seed determines."""
    return random.Random(f"{bench.seed} {part}")


def command(
    work: Callable[[], object],
    log_path: Path,
    *,
    before: Callable[[], object] | None = None,
    meanwhile: Callable[[int], object] | None = None,
    waits: bool = False,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Ended:
    """Run `work` as the command line runs a command, in a forked process.

    `before` is done in that process first. `meanwhile` is given its id in this one; with `waits` the process is
    stopped until somebody lets it go on.
    """
    started = time.monotonic()
    child = start(work, log_path, before=before, waits=waits)
    if meanwhile is not None:
        meanwhile(child)
    code = wait(child, started + patience_seconds)
    return Ended(code, log_path.read_text(encoding="utf-8", errors="replace"), time.monotonic() - started)


def start(
    work: Callable[[], object],
    log_path: Path,
    *,
    before: Callable[[], object] | None = None,
    waits: bool = False,
) -> int:
    """Fork a process that runs `work` as a command; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        if waits:
            os.waitpid(child, os.WUNTRACED)
        return child
    code = 1
    try:
        _become_command(log_path)
        if waits:
            _may_be_traced()
            os.kill(os.getpid(), signal.SIGSTOP)
        if before is not None:
            before()
        code = _run_as_command(work)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int, end_at: float) -> int | None:
    """Wait for the end of a forked process; give its code, 128 + N for a signal, None when it had to be killed."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        if time.monotonic() > end_at:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(_POLL_SECONDS)


def _become_command(log_path: Path) -> None:
    """Have a session, streams and signals of one's own."""
    os.setsid()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False, buffering=1)  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _run_as_command(work: Callable[[], object]) -> int:
    """Give `work` the place of a command behind everything that the command line does about errors and signals."""
    from flows.cli import commands
    from flows.cli.console import prepare_console

    prepare_console()

    def run(tokens: Sequence[str]) -> None:
        work()

    commands._run_command = run
    return commands.main([])


def _may_be_traced() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY_TRACER, 0, 0, 0)
