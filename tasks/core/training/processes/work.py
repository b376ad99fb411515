"""What is trained, and the interface of those who train it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from tasks.core.records import ModelManifest
from tasks.core.training.job import Job
from tasks.core.training.progress import TrainingProgress

if TYPE_CHECKING:
    from tasks.core.training.remote.trainings import RemoteTrainings

Strategy: TypeAlias = Literal["one", "ddp", "fsdp"]
"""`one`: nothing is shared. `ddp`: each process holds the model and learns from its rows of an update. `fsdp`: each
holds only a part of weights, gradients and optimizer besides."""
Report: TypeAlias = Callable[[TrainingProgress], None]

MOST_RESTARTS = 3
SILENCE_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class TrainingWork:
    """One training and where it becomes a model; can be pickled, so any process can be given it.

    `model_dir` is claimed and locked by whoever hands the work out, and every process of the group must reach it.
    `job.device` is that of a single process; each process of a group takes its own (`rank.py`). After a process has
    died the group is begun again from the newest whole checkpoint, `most_restarts` times; a process that has not been
    heard for `silence_seconds` counts as dead. `group_id` is new for each command. With a `home` at a URL, of which
    `model_dir` lies in this machine's mirror, those who train bring and send checkpoints and model themselves.
    """

    job: Job
    model_dir: Path
    group_id: str
    processes: int = 1
    strategy: Strategy = "one"
    most_restarts: int = MOST_RESTARTS
    silence_seconds: float = SILENCE_SECONDS
    home: RemoteTrainings | None = None


class Trainers(Protocol):
    """The processes that train. They hold no result: it is the model directory."""

    sends_checkpoints: ClassVar[bool]
    """Whether they bring and send what lies at a URL: on a cluster, the directory of this machine may not be theirs."""

    def train(self, work: TrainingWork, report: Report | None = None) -> ModelManifest:
        """Train from the start or the newest whole checkpoint and publish; `report` hears of finished updates.

        Returns the manifest, whose presence means that the model directory is complete. Raises what a training in
        this process raises (see `run.train`), and TrainingError when the group has died too often. No process of the
        group is left afterwards, however it ends.
        """

    def dismiss(self) -> None:
        """Let processes go that wait for work which does not come: the model was there, or an error came before."""
