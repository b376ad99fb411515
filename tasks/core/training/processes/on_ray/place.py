"""What a worker must have in front of it before it trains: the model's directory, the same versions, the same base.

Where the models lie at a URL each machine works in its own mirror, into which it brings what it needs.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.core.errors import ConfigError, RunKeyMismatchError, TuneproofError
from tasks.core.provenance import library_versions
from tasks.core.records import ModelIdentity
from tasks.core.training import checkpoints
from tasks.core.training.processes.team import OthersFailedError, Team
from tasks.core.training.processes.work import TrainingWork

TOKEN_PREFIX = ".seen-by-"
_MUST_AGREE = ("tuneproof", "torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a worker has in front of it: whether `directory` is the one in which the training was begun.

    Of a model that lies at a URL the directory is in the mirror of the worker's machine.
    """

    host: str
    folder: bool
    directory: Path
    versions: dict[str, str]
    base: tuple[str | None, ...]
    error: TuneproofError | None

    @property
    def machine(self) -> tuple[str, Path]:
        return self.host, self.directory


def settled(work: TrainingWork, token: str, team: Team) -> TrainingWork:
    """The work as this worker's machine can do it, after all have seen that they can; called by all together.

    Raises ConfigError, RunKeyMismatchError or what reading the base raises, in the first worker; in the others
    OthersFailedError.
    """
    mine = _seen(work, token)
    found = _everyones(mine, team)
    problem = _problem(work, found)
    if problem is not None:
        raise problem if team.leads else OthersFailedError
    work = replace(work, model_dir=mine.directory)
    if not all(seen.folder for seen in found):
        _bring(work, team, found)
    return work


def _everyones(value: Any, team: Team) -> list[Any]:
    from torch import distributed

    found: list[Any] = [None] * team.size
    distributed.all_gather_object(found, value)
    return found


def _seen(work: TrainingWork, token: str) -> _Seen:
    from tasks.core.models.loading import identify

    directory = work.model_dir if work.home is None else work.home.models.local / work.model_dir.name
    base, error = _digests(work.job.base), None
    try:
        folder = (directory / f"{TOKEN_PREFIX}{work.group_id}").read_text(encoding="utf-8") == token
    except OSError:
        folder = False
    try:
        base = _digests(identify(work.job.spec))
    except TuneproofError as caught:
        error = caught
    return _Seen(socket.gethostname(), folder, directory, library_versions(_MUST_AGREE), base, error)


def _digests(base: ModelIdentity) -> tuple[str | None, ...]:
    return base.weights_sha256, base.adapter_sha256, base.chat_template_sha256


def _problem(work: TrainingWork, found: list[_Seen]) -> TuneproofError | None:
    blind = sorted({seen.host for seen in found if not seen.folder})
    if blind and work.home is None:
        return ConfigError(
            f"{work.model_dir} is not on every machine that trains; it is not seen on: {', '.join(blind)}",
            "put pipeline.models_dir at a URL, or into a folder that all machines share, by the same path",
        )
    if blind and work.strategy == "fsdp" and len({seen.machine for seen in found}) > 1:
        return ConfigError(
            'with strategy = "fsdp" each machine writes its part of a checkpoint, so models_dir cannot be at a URL',
            "put pipeline.models_dir into a folder that all machines of the cluster share, by the same path",
        )
    expected = found[0].versions
    for seen in found:
        if seen.error is not None:
            return seen.error
        if seen.versions != expected:
            return ConfigError(
                f"machines of the Ray cluster differ: {found[0].host} has {_text(expected)}; "
                f"{seen.host} has {_text(seen.versions)}",
                "install the same versions everywhere",
            )
        if seen.base != _digests(work.job.base):
            return RunKeyMismatchError(
                f"the base model {work.job.config.base_model_id} on {seen.host} has other files than the one this "
                "training began with",
                "put the same files under that path on every machine",
            )
    return None


def _text(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _bring(work: TrainingWork, team: Team, found: list[_Seen]) -> None:
    """Bring the newest checkpoint to every machine, and go back to the newest that all of them have."""
    assert work.home is not None
    machines = [seen.machine for seen in found]
    is_first = machines.index(machines[team.rank]) == team.rank
    with team.telling():
        if is_first:
            work.home.bring(work.model_dir, resume=True)
    team.agree()
    checkpoints_dir = work.model_dir / checkpoints.CHECKPOINTS
    steps = _everyones({checkpoints.step_of(path) for path in checkpoints.all_whole(checkpoints_dir)}, team)
    if is_first:
        checkpoints.remove_all(checkpoints_dir, after_step=max(set.intersection(*steps), default=-1))
    team.agree()
