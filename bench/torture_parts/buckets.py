"""A bucket that fails: kills, requests without an answer and a server that stands still, while models are promoted,
rolled back and checkpoints are sent; and several machines at once. Pointer and history agree after each of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.checks.rows import Bench, Row
from bench.torture_parts.kills import send
from bench.torture_parts.stage import last_line, seen_harm
from bench.torture_parts.trials import (
    PATIENCE_SECONDS,
    Clock,
    Ended,
    Harm,
    Tally,
    command,
    source_of,
    start,
    wait,
)

PART = "buckets"
_MODELS = ("one", "two", "three")
_WORKS = ("promote", "rollback", "checkpoint")
_KINDS = ("KILL", "requests that fail", "a server that stands still")
_MACHINES = 3
# Shorter and longer than a client has patience, with one second for each answer and five tries.
_STOPPED_SECONDS = (2.5, 10.0)
_TIMEOUT_SECONDS = 1
_TRIALS_IN_A_PLACE = 20
_KEPT_CHECKPOINTS = 2


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Meet each kind of fault in turn until the time is up; one row for each."""
    missing = [name for name in ("s3fs", "moto") if importlib.util.find_spec(name) is None]
    if missing:
        yield Row("a bucket", "skipped", f"needs {', '.join(missing)}", part=PART)
        return
    from tests.making.buckets.s3_server import s3_server

    _load_libraries()
    source, clock = source_of(bench, PART), Clock(bench, share, short_turns=1)
    tallies = {kind: Tally(PART, kind) for kind in (*_KINDS, "machines at once")}
    seen = {kind: Counter[str]() for kind in tallies}
    with s3_server() as server:
        for trial in itertools.count():
            if not clock.has_turn():
                break
            if trial % _TRIALS_IN_A_PLACE == 0:
                stage = _Bucket(bench.folder / f"bucket-{trial}", server, f"s3://tuneproof/{trial}/models")
                stage.begin()
            for kind in _KINDS:
                work = source.choice(_WORKS)
                harm, ended = _met(stage, work, kind, source)
                tallies[kind].count(harm, what=work)
                seen[kind][f"{work} {ended}"] += 1
            tallies["machines at once"].count(_at_once(stage, source), faults=_MACHINES)
    for kind, tally in tallies.items():
        told = ", ".join(f"{what} {count}" for what, count in sorted(seen[kind].items()))
        yield tally.row(told)


def _load_libraries() -> None:
    """Import what each process needs; none of it has begun a thread or a connection."""
    for name in (
        "aiobotocore.session", "botocore.endpoint", "s3fs", "tasks.core.models.trained.model_store",
        "tasks.core.promotion.promotion", "tasks.core.training.remote.checkpoints",
    ):  # fmt: skip
        importlib.import_module(name)


@dataclass
class _Bucket:
    """A place at the server, and the machines that use it, each with a cache of its own."""

    folder: Path
    server: Any
    url: str
    step: int = 1
    last: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Send three models, promote each, send a checkpoint; take the time of each work."""
        self.folder.mkdir(parents=True)
        self._must(self.act("begin"))
        for work in _WORKS:
            started = time.monotonic()
            self._must(self.act(work))
            self.seconds[work] = time.monotonic() - started
            self.step += work == "checkpoint"

    def _must(self, ended: Ended) -> None:
        if ended.code != 0:
            raise RuntimeError(f"a beginning could not be made: {ended.told[-2000:]}")

    def look(self) -> dict[str, Any]:
        """What a machine finds that has seen nothing of it yet, after it settled what was cut off."""
        shutil.rmtree(self.folder / "looker", ignore_errors=True)
        found_path = self.folder / "found.json"
        found_path.unlink(missing_ok=True)
        self._must(self.act("look", machine="looker"))
        found: dict[str, Any] = json.loads(found_path.read_text())
        self.last = found
        return found

    def act(self, work: str, machine: str = "0", **faults: Any) -> Ended:
        """Do a work in a process of its own."""
        return command(self.doing(work, machine), self.folder / "command.log", **faults)

    def doing(self, work: str, machine: str, model: str = "") -> Callable[[], object]:
        """Return what a process of a machine does."""
        return functools.partial(
            _act, work, self.url, self.folder, machine, dict(self.server.environ), self.step, model
        )


def _act(
    work: str, url: str, folder: Path, machine: str, environ: dict[str, str], step: int, model: str
) -> None:
    os.environ.update(environ, TUNEPROOF_CACHE=str(folder / machine), AWS_MAX_ATTEMPTS="1")
    import fsspec

    fsspec.config.conf["s3"] = {
        "config_kwargs": {"read_timeout": _TIMEOUT_SECONDS, "connect_timeout": _TIMEOUT_SECONDS}
    }
    from tasks.core.models.trained.champion import current_champion
    from tasks.core.promotion.promotion import Actor, promote, roll_back
    from tasks.core.storage.store import Store

    models = Store(url)
    if work == "begin":
        _begin(models, folder)
    elif work == "look":
        (folder / "found.json").write_text(json.dumps(_found(models)))
    elif work == "rollback":
        roll_back(models, Actor("anna"))
    elif work == "checkpoint":
        _send_checkpoint(models, step)
    else:
        present = current_champion(models)
        names = [name for name in _MODELS if present is None or name != present.run_name]
        promote(models, model or names[0], Actor("anna", "better"), None, force=True)


def _begin(models: Any, folder: Path) -> None:
    from tasks.core.models.trained.model_store import send_model
    from tasks.core.promotion.promotion import Actor, promote
    from tests.making.model_runs import make_run

    for name in _MODELS:
        send_model(models, make_run(models.local, name, base=folder))
        promote(models, name, Actor("anna", "first"), None, force=True)


def _send_checkpoint(models: Any, step: int) -> None:
    """Write a checkpoint as a training does, and send it; the network's faults end it as they end a command."""
    from tasks.core.training import checkpoints
    from tasks.core.training.remote.checkpoints import RemoteCheckpoints

    own = RemoteCheckpoints(models, models.local / "trained")
    directory = own.here / f"checkpoint-{step}"
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints.unseal(directory)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": [], "step": step}))
    for name in ("optimizer.pt", "adapter_model.safetensors"):
        (directory / name).write_bytes(random.Random(f"{step} {name}").randbytes(3000))
    checkpoints.seal(directory, seconds=step)
    checkpoints.rotate(own.here, _KEPT_CHECKPOINTS, None)
    if own.send(directory):
        own.rotate(directory.name, _KEPT_CHECKPOINTS, None)


def _found(models: Any) -> dict[str, Any]:
    from tasks.core.models.trained.alias import read_line
    from tasks.core.models.trained.champion import current_champion
    from tasks.core.promotion.promotion import in_force, promotion_history
    from tasks.core.training import checkpoints
    from tasks.core.training.remote.checkpoints import RemoteCheckpoints

    champion = current_champion(models)
    line, entries = read_line(models), promotion_history(models)
    own = RemoteCheckpoints(models, models.local / "trained")
    own.bring_newest()
    newest = checkpoints.resume_point(own.here)
    return {
        "champion": champion and champion.run_name,
        "agree": line.pointer == line.decided,
        "lines": [change.change_id for change in line.history.changes],
        "names": [entry.promotion.run_name for entry in entries],
        "replaced": [entry.replaced for entry in entries],
        "untold": line.untold is not None,
        "can go back": len(in_force(entries)) > 1,
        "step": -1 if newest is None else checkpoints.step_of(newest),
        "kept": len(own.there()),
    }


def _met(stage: _Bucket, work: str, kind: str, source: random.Random) -> tuple[Harm, str]:
    """Let one work meet one fault, look, let it be done to its end, and look again."""
    before = stage.last or stage.look()
    if work == "rollback" and not before["can go back"]:
        work = "promote"
    ended = _disturbed(stage, work, kind, source)
    after = stage.look()
    harm = seen_harm(ended)
    if not harm.any and ended.code not in (0, 128 + signal.SIGKILL) and not ended.is_refusal:
        harm.lost, harm.notes = 1, [f"ended with {ended.code}: {last_line(ended)}"]
    harm.add(_alias_harm(before, after))
    if work == "checkpoint":
        harm.add(_checkpoint_harm(before, after, stage.step, is_sent=ended.code == 0))
    elif ended.code == 0 and len(after["lines"]) == len(before["lines"]):
        harm.add(Harm(silently_wrong=1, notes=[f"{kind}: it ended well, and nothing was changed"]))
    harm.add(_again(stage, work, before, after))
    how = {0: "ended well", 128 + signal.SIGKILL: "killed"}
    return harm, how.get(ended.code or 0, "refused")


def _disturbed(stage: _Bucket, work: str, kind: str, source: random.Random) -> Ended:
    delay = source.uniform(0.0, stage.seconds[work])
    if kind == "KILL":
        return stage.act(work, meanwhile=functools.partial(send, number=signal.SIGKILL, after_seconds=delay))
    if kind == "requests that fail":
        stage.server.control(rate=source.choice((0.03, 0.1, 0.3)), seed=source.random())
        try:
            return stage.act(work)
        finally:
            stage.server.control(rate=0)
    stopping = threading.Thread(target=_stop, args=(stage.server, delay, source.choice(_STOPPED_SECONDS)))
    stopping.start()
    ended = stage.act(work)
    stopping.join()
    return ended


def _stop(server: Any, delay: float, seconds: float) -> None:
    time.sleep(delay)
    with server.stopped():
        time.sleep(seconds)


def _again(stage: _Bucket, work: str, before: dict[str, Any], after: dict[str, Any]) -> Harm:
    """Give the same command where a person would, and see that it ends where an undisturbed one does."""
    is_done = len(after["lines"]) > len(before["lines"])
    if work == "rollback" and is_done and not after["untold"]:
        return Harm()
    if work == "promote" and is_done:
        return Harm()  # the same command would name a model that is promoted already
    ended = stage.act(work)
    then = stage.look()
    harm = Harm()
    if ended.code != 0:
        harm.lost, harm.notes = 1, [f"cannot go on: {last_line(ended)}"]
    harm.add(_alias_harm(before, then))
    if work == "checkpoint":
        harm.add(_checkpoint_harm(before, then, stage.step, is_sent=True))
        stage.step += 1
    elif len(then["lines"]) != len(before["lines"]) + 1:
        harm.add(Harm(doubled=1, notes=[f"{work} twice: {len(then['lines']) - len(before['lines'])} lines"]))
    return harm


def _alias_harm(before: dict[str, Any], after: dict[str, Any]) -> Harm:
    harm, lines = Harm(), after["lines"]
    if lines[: len(before["lines"])] != before["lines"]:
        harm.lost += 1
        harm.notes.append("a line of the history is gone or another one")
    if len(set(lines)) != len(lines) or len(lines) > len(before["lines"]) + 1:
        harm.doubled += 1
        harm.notes.append(f"{len(lines) - len(before['lines'])} lines were added")
    if not after["agree"] or after["champion"] != after["names"][-1]:
        harm.mixed += 1
        harm.notes.append(f"pointer {after['champion']}, history ends with {after['names'][-1]}")
    return harm


def _checkpoint_harm(before: dict[str, Any], after: dict[str, Any], step: int, *, is_sent: bool) -> Harm:
    harm = Harm()
    if after["step"] < before["step"] or (is_sent and after["step"] != step):
        harm.lost, harm.notes = 1, [f"step {after['step']} of {step} is whole, {before['step']} was before"]
    if is_sent and after["kept"] > _KEPT_CHECKPOINTS:
        harm.silently_wrong, harm.notes = 1, [f"{after['kept']} checkpoints are there"]
    return harm


def _at_once(stage: _Bucket, source: random.Random) -> Harm:
    """Promotions and rollbacks by some machines: each holds or is refused, and each line follows the one before."""
    before = stage.last or stage.look()
    acts = [
        stage.doing("rollback", f"machine-{number}")
        if source.random() < 0.3
        else stage.doing("promote", f"machine-{number}", source.choice(_MODELS))
        for number in range(_MACHINES)
    ]
    started = time.monotonic()
    logs = [stage.folder / f"machine-{number}.log" for number in range(_MACHINES)]
    children = [start(act, log) for act, log in zip(acts, logs, strict=True)]
    codes = [wait(child, started + PATIENCE_SECONDS) for child in children]
    harm, after = Harm(), stage.look()
    for code, log in zip(codes, logs, strict=True):
        ended = Ended(code, log.read_text(errors="replace"), 0.0)
        harm.add(seen_harm(ended))
        if code not in (0, None) and not ended.is_refusal:
            harm.lost += 1
            harm.notes.append(f"ended with {code}: {last_line(ended)}")
    added = len(after["lines"]) - len(before["lines"])
    if added > codes.count(0):
        harm.doubled += 1
        harm.notes.append(f"{codes.count(0)} commands ended well, {added} lines were added")
    if after["lines"][: len(before["lines"])] != before["lines"]:
        harm.lost += 1
    harm.mixed += sum(new != old for old, new in zip(after["names"], after["replaced"][1:], strict=False))
    harm.mixed += not after["agree"]
    return harm
