"""Kills: KILL, TERM and STOP with CONT at random moments of each work; the same command then goes on to the end."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import SHORT_WORKS, Stage, Work, last_line, seen_harm
from bench.torture_parts.trials import Clock, Ended, Harm, Tally, command, source_of

PART = "kills"
MOST_KILLS = 3
_BATCH_SIZES = (1, 4, 9, 32)
_STOPPED_SECONDS = 0.15
# Weights of the works: those that take long and leave much on the disk are met more often.
_WORKS = {"infer": 6, "finetune": 3, "evaluate": 2, "promote": 2, "rollback": 2, "reject": 1}


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Kill until the time is up; one row for each signal."""
    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=2),
    )
    kinds = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP and CONT": signal.SIGSTOP}
    tallies = {kind: Tally(PART, kind) for kind in kinds}
    moments: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    while clock.has_turn():
        for kind, number in kinds.items():
            names = SHORT_WORKS if bench.tiny else tuple(_WORKS)
            work = stage.works[source.choices(names, [_WORKS[name] for name in names])[0]]
            stage.expected(work)
            stage.fresh(work)
            kills, harm = _killed(stage, work, number, source, moments[kind])
            tallies[kind].count(harm, faults=kills, what=work.name)
    for kind, tally in tallies.items():
        seen = ", ".join(f"{moment} {count}" for moment, count in moments[kind].most_common())
        yield tally.row(f"{tally.faults} at: {seen}")


def _killed(
    stage: Stage, work: Work, number: signal.Signals, source: random.Random, moments: Counter[str]
) -> tuple[int, Harm]:
    """Kill a work one to three times and let it end; give how often it was killed, and the harm."""
    harm, kills = Harm(), 0
    ledger_path = stage.place / "runs" / "run" / "ledger.jsonl"
    for _ in range(source.randint(1, MOST_KILLS)):
        before = _whole_lines(ledger_path)
        delay = source.uniform(0.0, stage.seconds(work) * 1.05)
        ended = _run(stage, work, source, functools.partial(send, number=number, after_seconds=delay))
        harm.add(_ended_by(ended, work, number))
        harm.lost += len(before - _whole_lines(ledger_path))
        if ended.killed or number == signal.SIGSTOP:
            kills += 1
            moments[f"{work.name} {moment_of(work, stage.place)}" if ended.killed else work.name] += 1
        if not ended.killed:
            break
        if is_over(work, stage):
            break  # what a person would see is a finished command: nobody gives it again
    ended = _run(stage, work, source, None) if not is_over(work, stage) else ended
    if ended.killed or number == signal.SIGSTOP:
        harm.add(stage.compared(work))
    else:
        harm.add(stage.after(work, ended))
    return kills, harm


def _run(stage: Stage, work: Work, source: random.Random, meanwhile: object) -> Ended:
    changes = {"inferencer__batch_size": source.choice(_BATCH_SIZES)} if work.name == "infer" else {}
    return command(
        functools.partial(work.act, stage.place, **changes), stage.log_path, meanwhile=meanwhile  # type: ignore[arg-type]
    )  # fmt: skip


def send(child: int, *, number: signal.Signals, after_seconds: float) -> None:
    """Send the signal; a stopped process goes on after a while."""
    time.sleep(after_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
        if number == signal.SIGSTOP:
            time.sleep(_STOPPED_SECONDS)
            os.kill(child, signal.SIGCONT)


def _ended_by(ended: Ended, work: Work, number: signal.Signals) -> Harm:
    """A killed command prints no traceback; one that was only stopped ends as ever."""
    harm = seen_harm(ended)
    well = (128 + number, 2 if work.refused else 0)
    if not harm.any and ended.code not in well:
        harm.lost, harm.notes = 1, [f"ended with {ended.code}: {last_line(ended)}"]
    return harm


def is_over(work: Work, stage: Stage) -> bool:
    """Whether a work was done although its command was killed on its way out."""
    return works.is_done(work, stage.place, stage.expected(work))


def _whole_lines(path: Path) -> set[bytes]:
    return set(path.read_bytes().split(b"\n")[:-1]) if path.is_file() else set()


def moment_of(work: Work, place: Path) -> str:
    """In which phase a work was, by what it left."""
    if work.name == "infer":
        run = place / "runs" / "run"
        phases = {
            "after the end": run / "manifest.json", "publishing": run / "inferencer_output.jsonl",
            "scoring references": run / "reference_likelihoods.jsonl", "answering": run / "ledger.jsonl",
        }  # fmt: skip
    elif work.name == "finetune":
        trained = place / "models" / "trained"
        phases = {
            "after the end": trained / "tuneproof_manifest.json", "publishing": trained / ".publishing",
            "after a checkpoint": trained / "checkpoints", "beginning": trained / "identity.json",
        }  # fmt: skip
    elif work.name == "evaluate":
        run = place / "runs" / "run-of-one"
        phases = {
            "after the report": run / "report.html", "reporting": run / "evaluator_output_summary.json",
            "after the scores": run / "scores.jsonl",
        }  # fmt: skip
    else:
        return "somewhere"
    return next((phase for phase, path in phases.items() if path.exists()), "loading")
