"""Damage: each file that a run, an evaluation, a training or a promotion leaves, in each of six ways.

`OUTCOMES` states what a command then does. Whatever it states, the end is the right one or a refusal with one message;
a file that the table does not know is a failure too. `mended` is said where a person overrides the damage: the end is
the right one but for what was lost, the damage is told, and what was there is kept beside.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import Stage, State, Work, last_line, seen_harm
from bench.torture_parts.trials import Clock, Ended, Harm, Tally, by_turns, command, source_of

PART = "damage"
Outcome = Literal["refused", "right", "refused or right", "mended"]
_BLOCK_BYTES = 512


def _cut(path: Path, other: Path, source: random.Random) -> None:
    """More than a last line break is gone."""
    path.write_bytes(path.read_bytes()[: source.randrange(max(1, path.stat().st_size - 1))])


def _flip(path: Path, other: Path, source: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


def _blank(path: Path, other: Path, source: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = source.randrange(len(content))
    end = min(len(content), start + _BLOCK_BYTES)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _remove(path: Path, other: Path, source: random.Random) -> None:
    path.unlink()


def _swap(path: Path, other: Path, source: random.Random) -> None:
    path.write_bytes(other.read_bytes())


def _double(path: Path, other: Path, source: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(at := source.randrange(len(lines)), lines[at])
    path.write_bytes(b"".join(lines))


DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "cut": _cut, "flipped bit": _flip, "NUL block": _blank, "missing": _remove, "another's": _swap,
    "doubled line": _double,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file by the state it lies in; `outcome` holds unless `but` names the damage."""

    state: str
    pattern: str
    outcome: Outcome
    but: dict[str, Outcome]

    def of(self, damage: str) -> Outcome:
        """Return what a command does about a damage."""
        return self.but.get(damage, self.outcome)


def kind(state: str, pattern: str, outcome: Outcome, **but: Outcome) -> Kind:
    """Make a kind; damages are named with underscores."""
    names = {"anothers": "another's"}
    return Kind(
        state, pattern, outcome, {names.get(name, name.replace("_", " ")): one for name, one in but.items()}
    )


EITHER: Outcome = "refused or right"
# The first that fits counts. `EITHER` where it depends on the place: a name or time that nobody compares, a key that is
# there twice.
OUTCOMES = (
    kind("*", "*/.lock*", "right"),
    kind("*", "models/.*.lock", "right"),
    # Only rows whose lines are damaged are asked again.
    kind("half a run", "runs/run/ledger.jsonl", "right"),
    kind("half a run", "runs/run/sessions.jsonl", "right"),
    # Without it nobody knows whose answers the ledger has.
    kind("half a run", "runs/run/identity.json", "refused", doubled_line=EITHER),
    # Published anew from the ledger, scored anew; a ledger that is published is not needed.
    kind("finished run", "runs/run/identity.json", "refused", missing="right", doubled_line=EITHER),
    kind("finished run", "runs/run/*", "right"),
    # What a report is made of has digests in the summary.
    kind("report", "runs/run-of-one/evaluator_output_summary.json", "refused", doubled_line=EITHER),
    kind("report", "runs/run-of-one/scores.jsonl", "refused"),
    kind("report", "runs/run-of-one/inferencer_output.jsonl", "refused"),
    kind("report", "runs/base/inferencer_output.jsonl", "refused"),
    kind("report", "*", "right"),
    # Fewer challenges than there were would make the gate more lenient.
    kind("evaluation again", "models/challenges.jsonl", "refused", anothers="right"),
    kind("evaluation again", "models/challenges.json", "refused", anothers="right", missing="right"),
    kind("evaluation again", "runs/run-of-three/*", "right"),
    kind("evaluation again", "runs/*/inferencer_output.jsonl", "refused"),
    kind("evaluation again", "runs/*/manifest.json", "refused", flipped_bit=EITHER),
    kind("evaluation again", "*", "right"),
    # An older checkpoint, or the beginning, gives the same weights.
    kind("interrupted training", "models/trained/checkpoints/*", "right"),
    kind("interrupted training", "models/trained/*", EITHER),
    kind("trained model", "models/trained/*", EITHER),
    # Pointer and history must agree; the weights of the model that is gone back to have a digest.
    kind("rollback", "models/promotions.jsonl", "refused"),
    kind("rollback", "models/promoted.json", "refused", doubled_line=EITHER),
    kind("rollback", "models/two/adapter_model.safetensors", "refused"),
    kind("rollback", "models/two/*", EITHER),
    kind("rollback", "*", "right"),
    # A person who forces a promotion passes over the damage.
    kind("promotion", "models/promotions.jsonl", "mended"),
    kind("promotion", "models/promoted.json", "right", anothers="mended"),
    kind("promotion", "models/three/*", EITHER),
    kind("promotion", "*", "right"),
    kind("promotion by verdict", "models/promotions.jsonl", "refused"),
    kind("promotion by verdict", "models/promoted.json", "refused", doubled_line=EITHER),
    kind("promotion by verdict", "models/*/adapter_model.safetensors", "refused"),
    kind("promotion by verdict", "models/best/*", EITHER),
    kind("promotion by verdict", "models/two/*", EITHER),
    kind(
        "promotion by verdict",
        "runs/run-of-best/evaluator_output_summary.json",
        "refused",
        doubled_line=EITHER,
    ),
    kind("promotion by verdict", "*", "right"),
)


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Damage every file in every way, or as many as there is time for; one row for each state."""
    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=10),
    )
    states = states_of(stage, short=bench.tiny)
    waiting = {name: _trials(name, states[name].begin) for name in states}
    there = {name: len(trials) for name, trials in waiting.items()}
    tallies = {name: Tally(PART, name) for name in states}
    for name, (below, damage) in by_turns(waiting, clock, source):
        harm = _damaged(stage, states[name], below, damage, source)
        tallies[name].count(harm, what=f"{damage}: {below}")
    for name, tally in tallies.items():
        yield tally.row(f"{there[name] - len(waiting[name])} of {there[name]} files and damages")


def outcome_of(state: str, below: str, damage: str) -> Outcome | None:
    """Return what the table states; None for a file that it does not know."""
    for one in OUTCOMES:
        if fnmatch.fnmatch(state, one.state) and fnmatch.fnmatch(below, one.pattern):
            return one.of(damage)
    return None


def _trials(state: str, begin: Path) -> list[tuple[str, str]]:
    files = [
        path for path in sorted(begin.rglob("*")) if path.is_file() and not _is_another(state, path, begin)
    ]
    return [
        (path.relative_to(begin).as_posix(), damage)
        for path in files
        for damage in DAMAGES
        if path.stat().st_size or damage == "missing"
    ]


def _is_another(state: str, path: Path, begin: Path) -> bool:
    """Whether a file is that of a run the work does not look at, of an old checkpoint, or only told on a page."""
    parts = path.relative_to(begin).parts
    if state in ("report", "evaluation again") and parts[0] == "models" and len(parts) > 2:
        return True
    if state == "promotion by verdict":
        return bool({"base", "run-of-one", "run-of-three", "one", "three"} & set(parts)) or "worse" in str(
            path
        )
    return bool({"run-of-two", "run-of-worse", "worse", "checkpoint-2"} & set(parts))


def _damaged(stage: Stage, state: Work, below: str, damage: str, source: random.Random) -> Harm:
    stage.expected(state)
    path = stage.fresh(state) / below
    other = _another(stage, state, below)
    if damage == "another's" and not other.is_file():
        damage, other = "cut", path
    DAMAGES[damage](path, other, source)
    history_path = stage.place / "models" / "promotions.jsonl"
    left = history_path.read_bytes() if history_path.is_file() else b""
    stated = outcome_of(state.name, below, damage)
    ended = stage.run(state)
    harm = seen_harm(ended)
    if harm.any:
        return harm
    if ended.code == 0:
        harm = stage.compared(state)
        if harm.any and stated == "mended" and _is_mended(stage, state, path, left, ended):
            return Harm()
    elif not ended.is_refusal:
        harm = Harm(tracebacks=1, notes=[f"ended with {ended.code}: {last_line(ended)}"])
    if not harm.any:
        harm = _as_stated(stated, ended)
    return harm


def _another(stage: Stage, state: Work, below: str) -> Path:
    """The file that is put in the place of one; of pointer and history, that of a later or an earlier day."""
    later = stage.folder / "begins" / "all-promoted" / below
    is_line = below in ("models/promoted.json", "models/promotions.jsonl")
    return later if is_line and state.name.startswith("promotion") else stage.folder / "others" / below


def _is_mended(stage: Stage, state: Work, path: Path, left: bytes, ended: Ended) -> bool:
    """Whether pointer and last change are right, the damage was told, and the `left` history is still there."""
    found, expected = state.final(stage.place), stage.expected(state)
    is_right = (
        found["pointer"] == expected["pointer"] and found["history"][-1][:2] == expected["history"][-1][:2]
    )
    kept = [one.read_bytes() for one in (stage.place / "models").glob("promotions.jsonl*")]
    is_kept = any(one.startswith(left) for one in kept)
    return is_right and is_kept and "warning: " in ended.told and path.name in ended.told


def _as_stated(stated: Outcome | None, ended: Ended) -> Harm:
    if stated is None:
        return Harm(silently_wrong=1, notes=["no outcome is stated for this file"])
    found = "refused" if ended.code else "right"
    if found not in stated and (found, stated) != ("right", "mended"):
        return Harm(silently_wrong=1, notes=[f"{found}, not {stated}: {last_line(ended)}"])
    return Harm()


def states_of(stage: Stage, *, short: bool = False) -> dict[str, Work]:
    """Return what is damaged: the beginning of each work has the files that it finds."""
    all_works = stage.works
    begins = stage.folder / "begins"
    if not (begins / "half a run").exists():
        _make_begins(stage, short=short)
    infer, finetune, evaluate = all_works["infer"], all_works["finetune"], all_works["evaluate"]
    found = [
        replace(infer, name="half a run", begin=begins / "half a run", harm=works.published_harm),
        replace(infer, name="finished run", begin=begins / "finished run", harm=works.published_harm),
        replace(evaluate, name="report", begin=begins / "evaluated", act=functools.partial(_report, stage)),
        replace(evaluate, name="evaluation again", begin=begins / "evaluated"),
        replace(finetune, name="interrupted training", begin=begins / "interrupted training"),
        # A training that is done is not done again; weights and tokenizer are looked at by whoever loads them.
        replace(finetune, name="trained model", begin=begins / "trained model", final=_training),
        replace(all_works["rollback"], begin=begins / "all-promoted", final=_alias, harm=None),
        replace(all_works["promote"], name="promotion", final=_alias, harm=None),
        Work(
            "promotion by verdict",
            begins / "better",
            functools.partial(works.promote_by_verdict, stage),
            _alias,
        ),
    ]
    return {work.name: work for work in found if work.begin.exists()}


def _training(place: Path) -> State:
    manifest = json.loads((place / "models" / "trained" / "tuneproof_manifest.json").read_text())
    return {"steps": manifest["steps"], "trained tokens": manifest["trained_tokens"]}


def _alias(place: Path) -> State:
    """Pointer and history."""
    return {"pointer": works.pointer(place), "history": works.history(place)}


def _report(stage: Stage, place: Path) -> None:
    from tasks.evaluator import Evaluator

    Evaluator(works.settings(stage, place), run="run-of-one", baseline=place / "runs" / "base").report()


def _make_begins(stage: Stage, *, short: bool) -> None:
    """Make the states, and those of others whose files are put in their place."""
    begins, others = stage.folder / "begins", stage.folder / "others"
    made = {
        "infer": functools.partial(works.infer, stage, stage.place, inferencer__seed=2),
        "finetune": functools.partial(works.finetune, stage, stage.place, fine_tuner__seed=2),
    }
    if short:  # a training takes seconds
        del made["finetune"]
    for name, act in made.items():
        work = stage.works[name]
        for act_now, kept in ((act, others), (functools.partial(work.act, stage.place), begins / name)):
            stage.fresh(work)
            ended = command(act_now, stage.log_path)
            if ended.code:
                raise RuntimeError(f"a beginning could not be made: {ended.told[-2000:]}")
            shutil.copytree(stage.place, kept, dirs_exist_ok=True)
    (begins / "infer").rename(begins / "finished run")
    _others_of_evaluations(begins, others)
    _cut_run(begins / "finished run", begins / "half a run")
    if not short:
        (begins / "finetune").rename(begins / "trained model")
        _cut_training(begins / "trained model", begins / "interrupted training")


def _others_of_evaluations(begins: Path, others: Path) -> None:
    """Another run's or model's file in the place of each: those of `two`, and an alias of before."""
    evaluated = begins / "all-promoted"
    shutil.copytree(evaluated, others, dirs_exist_ok=True)
    for name in ("promoted.json", "promotions.jsonl"):
        shutil.copy(begins / "two-promoted" / "models" / name, others / "models" / name)
    pairs = (("run-of-one", "run-of-two"), ("run-of-two", "run-of-three"), ("base", "run-of-worse"))
    for name, other in pairs:
        shutil.copytree(evaluated / "runs" / other, others / "runs" / name, dirs_exist_ok=True)
    for name, other in (("one", "two"), ("two", "three"), ("three", "one")):
        shutil.copytree(evaluated / "models" / other, others / "models" / name, dirs_exist_ok=True)


def _cut_run(finished: Path, half: Path) -> None:
    shutil.copytree(finished, half)
    run = half / "runs" / "run"
    for pattern in ("manifest.json", "inferencer_output.jsonl", "reference_likelihoods.*"):
        for path in run.glob(pattern):
            path.unlink()
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))


def _cut_training(trained: Path, interrupted: Path) -> None:
    shutil.copytree(trained, interrupted)
    model_dir = interrupted / "models" / "trained"
    for path in model_dir.iterdir():
        if path.is_file() and path.name != "identity.json" and not path.name.startswith("."):
            path.unlink()
    newest = max((model_dir / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
