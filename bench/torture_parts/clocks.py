"""A clock that is moved back and forth between and during commands: no answer, score, weight or alias depends on it."""

from __future__ import annotations

import datetime
import functools
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.checks.rows import Bench, Row
from bench.torture_parts import kills
from bench.torture_parts.stage import SHORT_WORKS, Stage, Work, seen_harm
from bench.torture_parts.trials import Clock, Harm, Tally, command, source_of

PART = "clocks"
_DAY_SECONDS = 86_400.0
_MOVES = (-400 * _DAY_SECONDS, -_DAY_SECONDS, -3600.0, -2.0, 2.0, 3600.0, 400 * _DAY_SECONDS)


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Move the clock until the time is up: each work is killed once under one time and ended under another."""
    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=1),
    )
    tally, jumping = Tally(PART, "another time after a kill"), Tally(PART, "jumps while it works")
    names = SHORT_WORKS if bench.tiny else tuple(stage.works)
    turn = source.randrange(len(names))
    while clock.has_turn():
        work = stage.works[names[turn % len(names)]]
        stage.expected(work)
        tally.count(_killed_and_ended(stage, work, source), faults=2, what=work.name)
        work = stage.works[names[(turn + 1) % len(names)]]
        stage.expected(work)
        jumping.count(_jumped(stage, work, source), what=work.name)
        turn += 1
    yield tally.row(f"from {_MOVES[0] / _DAY_SECONDS:.0f} to {_MOVES[-1] / _DAY_SECONDS:.0f} days")
    yield jumping.row("each reading of the clock is up to 400 days off")


def _killed_and_ended(stage: Stage, work: Work, source: random.Random) -> Harm:
    stage.fresh(work)
    first, second = source.sample(_MOVES, 2)
    delay = source.uniform(0, stage.seconds(work))
    send = functools.partial(kills.send, number=signal.SIGKILL, after_seconds=delay)
    ended = stage.run(work, before=functools.partial(move_clock, lambda: first), meanwhile=send)
    harm = seen_harm(ended)
    if kills.is_over(work, stage):
        return harm
    harm.add(stage.after(work, stage.run(work, before=functools.partial(move_clock, lambda: second))))
    return harm


def _jumped(stage: Stage, work: Work, source: random.Random) -> Harm:
    place = stage.fresh(work)
    moves = random.Random(source.random())
    before = functools.partial(move_clock, lambda: moves.choice(_MOVES))
    return stage.after(work, command(functools.partial(work.act, place), stage.log_path, before=before))


def move_clock(offset_seconds: Callable[[], float]) -> None:
    """Let this process's Python code read a clock that is off by `offset_seconds()`, asked at each reading."""
    real_time, real_datetime = time.time, datetime.datetime

    class Moved(real_datetime):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real_datetime.now(tz) + datetime.timedelta(seconds=offset_seconds())

    time.time = lambda: real_time() + offset_seconds()
    for name, module in list(sys.modules.items()):
        if (
            name.partition(".")[0] in ("tasks", "flows")
            and getattr(module, "datetime", None) is real_datetime
        ):
            replaced: Any = module
            replaced.datetime = Moved
