"""Ten processes at once on one run, one training and one alias: the work is done once, and nothing mixes."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import Stage, Work, last_line, seen_harm
from bench.torture_parts.trials import PATIENCE_SECONDS, Clock, Ended, Harm, Tally, source_of, start, wait

PART = "crowds"
PROCESSES = 10
_MODELS = ("one", "two", "three")


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Start crowds until the time is up."""
    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=1),
    )
    tallies = {name: Tally(PART, f"ten on one {name}") for name in ("run", "evaluation", "training", "alias")}
    done = {"ended well": 0, "refused": 0}
    while clock.has_turn():
        for name, work in (("run", "infer"), ("evaluation", "evaluate"), ("training", "finetune")):
            if name == "run" or not bench.tiny:
                _count(tallies[name], _on_one(stage, stage.works[work], done))
        _count(tallies["alias"], _on_alias(stage, source))
    seen = f"{done['ended well']} ended well, {done['refused']} were told that another writes"
    for tally in tallies.values():
        if tally.trials:
            yield tally.row(seen)


def _count(tally: Tally, harm: Harm) -> None:
    tally.count(harm, faults=PROCESSES)


def _on_one(stage: Stage, work: Work, done: dict[str, int]) -> Harm:
    """The same work by ten: at least one ends well, others may be told that it is being written."""
    stage.expected(work)
    place = stage.fresh(work)
    ended = _together(stage, [functools.partial(work.act, place)] * PROCESSES)
    harm = Harm()
    for one in ended:
        harm.add(seen_harm(one))
        if one.code not in (0, None) and not one.is_refusal:
            harm.lost += 1
            harm.notes.append(f"ended with {one.code}: {last_line(one)}")
    well = sum(one.code == 0 for one in ended)
    done["ended well"] += well
    done["refused"] += sum(one.is_refusal for one in ended)
    if not well:
        harm.lost += 1
        harm.notes.append("none of ten ended well")
    harm.add(stage.compared(work))
    return harm


def _on_alias(stage: Stage, source: random.Random) -> Harm:
    """Promotions and rollbacks by ten: each line of the history replaces what the line before put there."""
    place = stage.fresh(stage.works["rollback"])
    acts = [
        functools.partial(works.roll_back, stage, place)
        if source.random() < 0.3
        else functools.partial(works.promote, stage, place, source.choice(_MODELS))
        for _ in range(PROCESSES)
    ]
    ended = _together(stage, acts)
    harm = Harm()
    for one in ended:
        harm.add(seen_harm(one))
    lines = works.history(place)
    pairs = itertools.pairwise(lines)
    harm.mixed += sum(after[2] != before[1] for before, after in pairs)
    harm.mixed += lines[-1][1] != works.pointer(place)
    well = sum(one.code == 0 for one in ended)
    if len(lines) - len(_MODELS) > well:
        harm.doubled += 1
        harm.notes.append(
            f"{well} commands ended well, the history has {len(lines) - len(_MODELS)} new lines"
        )
    return harm


def _together(stage: Stage, acts: Sequence[Callable[[], object]]) -> list[Ended]:
    started = time.monotonic()
    logs = [stage.folder / f"crowd-{number}.log" for number in range(len(acts))]
    children = [start(act, log) for act, log in zip(acts, logs, strict=True)]
    codes = [wait(child, started + 2 * PATIENCE_SECONDS) for child in children]
    seconds = time.monotonic() - started
    return [
        Ended(code, log.read_text(encoding="utf-8", errors="replace"), seconds)
        for code, log in zip(codes, logs, strict=True)
    ]
