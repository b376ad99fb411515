"""The process that began a training on a Ray cluster: it hears the workers, and sees to their end."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from tasks.core.config import FineTunerConfig
from tasks.core.errors import TrainingError
from tasks.core.files import write_atomically
from tasks.core.interruption import raise_if_interrupted
from tasks.core.models.trained import registry
from tasks.core.ray_cluster import ray_connection
from tasks.core.records import ModelManifest
from tasks.core.training.processes.child import Broke, Failed
from tasks.core.training.processes.on_ray.cluster import POLL_SECONDS, as_ours, require_ray
from tasks.core.training.processes.on_ray.place import TOKEN_PREFIX
from tasks.core.training.processes.work import Report, TrainingWork
from tasks.core.training.progress import TrainingProgress

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 10.0  # for processes that end by themselves when one has an error to tell
_KILL_SECONDS = 10.0


class OnRay:
    """Processes of the cluster that `fine_tuner.runner_address` names."""

    sends_checkpoints: ClassVar[bool] = True

    def __init__(self, config: FineTunerConfig) -> None:
        require_ray()
        self._connection = ExitStack()
        self._connection.enter_context(ray_connection(config.runner_address))

    def train(self, work: TrainingWork, report: Report | None = None) -> ModelManifest:
        """See `Trainers`."""
        token_path = work.model_dir / f"{TOKEN_PREFIX}{work.group_id}"
        token = f"{socket.gethostname()} {uuid4().hex}"
        write_atomically(token_path, token)
        try:
            _Group(replace(work, model_dir=work.model_dir.resolve()), token, report).run_to_end()
        finally:
            token_path.unlink(missing_ok=True)
        if work.home is not None:  # the first worker may have been on another machine
            work.home.bring(work.model_dir, resume=False)
        if registry.why_incomplete(work.model_dir) is not None:
            raise TrainingError(
                f"the processes of the training have ended, but {work.model_dir} is not complete",
                "run the same command again: it goes on from the newest checkpoint",
            )
        return registry.read_manifest(work.model_dir)

    def dismiss(self) -> None:
        """See `Trainers`."""
        self._connection.close()


class _Group:
    """The workers of one training, as this process has them: what they tell, and their end."""

    def __init__(self, work: TrainingWork, token: str, report: Report | None) -> None:
        from tasks.core.training.processes.on_ray.worker import Given

        self._work, self._report = work, report
        self._error: BaseException | None = None
        self._deaths = 0
        self._workers: list[Any] = []
        self._desk = self._begun_here("Desk")
        self._lead = self._begun_here("Lead")
        self._given = Given(work, token, str(Path.cwd()), self._desk, _level())

    def run_to_end(self) -> None:
        """Train until all workers have ended; none is left afterwards, however it ends."""
        import ray

        try:
            ending = self._lead.fit.remote(self._given)
            while not ray.wait([ending], timeout=0)[0]:
                raise_if_interrupted()
                self._hear(POLL_SECONDS)
                if self._error is not None:
                    ray.wait([ending], timeout=_LAST_WORDS_SECONDS)
                    break
            self._hear(0)
            if self._error is not None:
                raise self._error
            ray.get(ending)
        except ray.exceptions.RayError as error:
            raise as_ours(error) from error
        finally:
            self._end()

    def _begun_here(self, kind: str) -> Any:
        """An actor on the machine that this process is connected to: with it the training ends anyway."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from tasks.core.training.processes.on_ray import worker

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=0, max_restarts=0)(getattr(worker, kind))
        return actor.options(scheduling_strategy=here).remote()

    def _hear(self, seconds: float) -> None:
        import ray

        for message in ray.get(self._desk.take.remote(seconds)):
            if isinstance(message, logging.LogRecord):
                target = logging.getLogger(message.name)
                if target.isEnabledFor(message.levelno):
                    target.handle(message)
            elif isinstance(message, TrainingProgress):
                if self._report is not None:
                    self._report(message)
            elif isinstance(message, Failed):
                self._error = self._error or message.error
            elif isinstance(message, Broke):
                self._begin_again(message)
            else:
                self._workers.append(message)

    def _begin_again(self, broke: Broke) -> None:
        if broke.is_shortage:
            logger.warning(
                "memory ran out in a worker of the training; all begin again with fewer rows at once"
            )
            return
        self._deaths += 1
        if self._deaths > self._work.most_restarts:
            self._error = TrainingError(
                f"worker {broke.rank} of the training ended: {broke.cause}; it was the {self._deaths}th time that "
                "one did",
                "the same command goes on from the newest checkpoint; where the system kills workers for their "
                "memory, lower device_train_batch_size or processes",
            )
        else:
            logger.warning(
                "worker %s of the training ended: %s; all begin again from the newest checkpoint",
                *(broke.rank, broke.cause),
            )

    def _end(self) -> None:
        """End all that is left, and wait until it is gone: nobody else may write the model's directory."""
        import ray

        with suppress(ray.exceptions.RayError):
            self._workers += [
                message
                for message in ray.get(self._desk.take.remote(0), timeout=_KILL_SECONDS)
                if isinstance(message, ray.actor.ActorHandle)
            ]
        left = [self._lead, *self._workers, self._desk]
        for actor in left:
            ray.kill(actor)
        gone = [actor.__ray_ready__.remote() for actor in left]
        _, waiting = ray.wait(gone, num_returns=len(gone), timeout=_KILL_SECONDS)
        if waiting:
            logger.warning("%d processes of the training did not end in %d s", len(waiting), _KILL_SECONDS)


def _level() -> int:
    return logging.getLogger("tasks").getEffectiveLevel()
