"""What runs on a Ray cluster: the worker that trains its share, and who tells of all of them."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import queue
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tasks.core.children import portable
from tasks.core.errors import TrainingError, TuneproofError, first_line
from tasks.core.records import TrainingRestart
from tasks.core.training import checkpoints
from tasks.core.training.fitting import GroupShortageError
from tasks.core.training.processes.child import Broke, Failed
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.on_ray.cluster import root_cause
from tasks.core.training.processes.on_ray.place import settled
from tasks.core.training.processes.rank import team_of, train_share
from tasks.core.training.processes.team import OthersFailedError
from tasks.core.training.processes.work import Report, TrainingWork

logger = logging.getLogger(__name__)

_TOP_LOGGER = "tasks"
# Ray Train's 60 are too few for workers that load torch from a slow disk: it would begin them anew for ever.
_START_SECONDS = "600"
_SHORTAGES = 32  # halving the rows at once takes fewer


@dataclass(frozen=True, slots=True)
class Given:
    """What each worker is given. `token` is what it must find in the model's directory."""

    work: TrainingWork
    token: str
    working_dir: str
    desk: Any
    log_level: int


class Desk:
    """An actor that takes what workers say, for the process that began the training."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._broke: list[Broke] = []
        self._arrived = asyncio.Event()

    async def put(self, message: Any) -> None:
        """Take a message."""
        self._messages.append(message)
        self._arrived.set()

    async def put_broke(self, broke: Broke) -> None:
        """Take why the workers are begun again."""
        if not broke.is_shortage:
            self._broke.append(broke)
        await self.put(broke)

    async def take(self, seconds: float) -> list[Any]:
        """Give the messages there are, and wait for one at most so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), seconds)
        messages, self._messages = self._messages, []
        self._arrived.clear()
        return messages

    async def broke(self) -> list[Broke]:
        """All that was said of earlier tries, in order."""
        return self._broke


class Lead:
    """An actor that leads Ray Train: with it all of its workers end."""

    def fit(self, given: Given) -> None:
        """Train on the workers that the work says. Raises what Ray Train raises when they have died too often."""
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        work = given.work
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_SECONDS)
        on_gpu = work.job.device.startswith("cuda")
        with tempfile.TemporaryDirectory(prefix="tuneproof-ray-") as folder:
            TorchTrainer(
                share,
                train_loop_config={"given": ray.put(given)},
                torch_config=TorchConfig(
                    backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=int(work.silence_seconds)
                ),
                scaling_config=ScalingConfig(num_workers=work.processes, use_gpu=on_gpu),
                run_config=RunConfig(
                    name=work.group_id,
                    storage_path=folder,  # Ray Train's own notes; checkpoints are ours
                    failure_config=FailureConfig(
                        max_failures=work.most_restarts + (_SHORTAGES if work.strategy == "fsdp" else 0)
                    ),
                    callbacks=[_telling(given.desk)],
                ),
            ).fit()


def _telling(desk: Any) -> Any:
    """Runs beside Ray Train's controller: says why workers are begun again."""
    from ray.train import UserCallback

    class Telling(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            desk.put_broke.remote(_first_end(worker_exceptions))

    return Telling()


def _first_end(worker_exceptions: dict[int, Exception]) -> Broke:
    """The worker that ended first and why, as far as it can be told."""
    from ray.exceptions import RayError

    causes = {rank: root_cause(error) for rank, error in worker_exceptions.items()}
    shortage = any(isinstance(cause, GroupShortageError) for cause in causes.values())
    # One that was killed said nothing; what the others say comes from that.
    dead = [rank for rank, cause in causes.items() if isinstance(cause, RayError)]
    rank = min(dead or causes)
    return Broke("it was killed, or its machine is gone" if dead else _said(causes[rank]), rank, shortage)


def share(config: dict[str, Any]) -> None:
    """Train one worker's share. Runs in each worker of the group, with the process group that Ray Train has made."""
    import ray
    from ray import train as ray_train
    from ray.train.torch import get_device

    given: Given = ray.get(config["given"])
    rank = ray_train.get_context().get_world_rank()
    given.desk.put.remote(ray.get_runtime_context().current_actor)
    _log_to(given, rank)
    with suppress(OSError):  # relative paths are those of the machine that began the training
        os.chdir(given.working_dir)
    if given.work.job.device.startswith("cuda"):
        os.environ["LOCAL_RANK"] = str(get_device().index)
    try:
        work = settled(given.work, given.token, team_of(given.work.strategy))
        if rank == 0:
            _note_restarts(work, ray.get(given.desk.broke.remote()))
        _train(work, rank, lambda progress: given.desk.put.remote(progress))
    except OthersFailedError:
        logger.debug("another worker has an error to tell")
    except TuneproofError as error:
        # Not raised: Ray Train would begin again, and it would be the same.
        ray.get(given.desk.put.remote(Failed(portable(error, TrainingError))))


def _train(work: TrainingWork, rank: int, report: Report) -> None:
    """Train the share; the first worker sends checkpoints and model to a URL, from where they are written."""
    if work.home is None or rank != 0:
        train_share(work, report)
        return
    with work.home.sending(work.model_dir):
        manifest = train_share(work, report)
    if manifest is not None:
        work.home.publish(work.model_dir)


def _note_restarts(work: TrainingWork, broke: list[Broke]) -> None:
    checkpoints_dir = work.model_dir / checkpoints.CHECKPOINTS
    journal = Journal.of(checkpoints_dir, work.group_id, tidies=True)
    newest = checkpoints.newest_whole(checkpoints_dir)
    step = 0 if newest is None else checkpoints.step_of(newest)
    for one in broke[len(journal.restarts) :]:
        journal.note(TrainingRestart(cause=one.cause, rank=one.rank, step=step))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _log_to(given: Given, rank: int) -> None:
    """Send what this worker logs to the process that began the training; what all would say, the first says."""
    top = logging.getLogger(_TOP_LOGGER)
    for handler in [*top.handlers]:
        if isinstance(handler, _Sender):
            top.removeHandler(handler)
    if rank != 0:
        top.setLevel(logging.CRITICAL)
        return
    top.addHandler(_Sender(given.desk))
    top.setLevel(given.log_level)


class _Sender(logging.handlers.QueueHandler):
    """Sends records as finished text, which can be pickled."""

    def __init__(self, desk: Any) -> None:
        super().__init__(queue.SimpleQueue())  # not used
        self._desk = desk

    def enqueue(self, record: logging.LogRecord) -> None:
        self._desk.put.remote(record)
