"""Soak: many runs, trainings, evaluations and promotions in one process; memory, handles, threads and files stay."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import Stage, last_line, seen_harm
from bench.torture_parts.trials import Clock, Harm, Tally, command

PART = "soak"
_WARM_ROUNDS = 8
_SHORT_ROUNDS = (2, 4)
# Allocators keep pages; a leak grows with every round.
_GROWN_MIB = 24.0
_GROWN_MIB_A_ROUND = 0.35


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Work in one process until the time is up; then ask what it holds more than after the first rounds."""
    stage, clock, tally = (
        Stage(bench.folder / "stage"),
        Clock(bench, share, short_turns=1),
        Tally(PART, "one process"),
    )
    figures_path = bench.folder / "soak.json"
    figures_path.unlink(missing_ok=True)
    seconds = max(5.0, clock.left_seconds)
    ended = command(
        functools.partial(_many, stage, figures_path, seconds, bench.tiny), stage.log_path,
        patience_seconds=seconds * 2 + 120,
    )  # fmt: skip
    harm = seen_harm(ended)
    if not figures_path.exists():
        tally.count(harm if harm.any else Harm(lost=1, notes=[last_line(ended)]))
        yield tally.row()
        return
    first, last = json.loads(figures_path.read_text())
    rounds = last["rounds"] - first["rounds"]
    grown = last["mib"] - first["mib"]
    for name in ("handles", "threads", "temporary files"):
        if last[name] > first[name]:
            harm.lost += 1
            harm.notes.append(
                f"{name}: {first[name]} after {first['rounds']} rounds, {last[name]} at the end"
            )
    if grown > _GROWN_MIB + _GROWN_MIB_A_ROUND * rounds:
        harm.lost += 1
        harm.notes.append(f"memory grew by {grown:.0f} MiB in {rounds} rounds")
    tally.trials, tally.faults = last["rounds"] - 1, 0
    tally.count(harm, faults=0)
    yield tally.row(
        f"{last['rounds']} rounds; after {first['rounds']} and all: {first['mib']:.0f} and {last['mib']:.0f} MiB, "
        f"{first['handles']} and {last['handles']} handles, {first['threads']} and {last['threads']} threads, "
        f"{first['temporary files']} and {last['temporary files']} temporary files"
    )


def _many(stage: Stage, figures_path: Path, seconds: float, short: bool) -> None:
    """A round: infer, roll back, promote; in a long soak evaluate too, and train every fourth time."""
    end_at = time.monotonic() + seconds
    own_temporary = stage.folder / "temporary"
    own_temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(own_temporary)
    warm, least = _SHORT_ROUNDS if short else (_WARM_ROUNDS, 2 * _WARM_ROUNDS)
    first = None
    rounds = 0
    while rounds < least or (time.monotonic() < end_at and not short):
        place = stage.fresh(stage.works["rollback"])
        works.infer(stage, place)
        works.roll_back(stage, place)
        works.promote(stage, place, "three")
        if not short:
            works.evaluate(stage, place)
        if not short and rounds % 4 == 0:
            works.finetune(stage, place)
        rounds += 1
        if rounds == warm:
            first = _held(rounds, own_temporary, place)
    figures_path.write_text(json.dumps([first, _held(rounds, own_temporary, stage.place)]))
    shutil.rmtree(own_temporary)


def _held(rounds: int, own_temporary: Path, place: Path) -> dict[str, float]:
    import gc

    import psutil

    gc.collect()
    left = [*own_temporary.rglob("*"), *place.rglob("*.tmp"), *place.rglob(".*.partial")]
    return {
        "rounds": rounds,
        "mib": psutil.Process().memory_info().rss / 2**20,
        "handles": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
        "temporary files": len(left),
    }
