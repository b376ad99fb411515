"""Several processes of this machine train, which torch's elastic agent starts, watches and begins again."""

from __future__ import annotations

import logging
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from tasks.core.errors import TrainingError
from tasks.core.models.trained import registry
from tasks.core.records import ModelManifest
from tasks.core.training.processes.work import Report, TrainingWork

_AGENT_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")
_EVENTS_LOGGER = "torchelastic-events-null"


class Elastic:
    """A group of processes on this machine."""

    sends_checkpoints: ClassVar[bool] = False

    def train(self, work: TrainingWork, report: Report | None = None) -> ModelManifest:
        """See `Trainers`."""
        from tasks.core.training.processes.agent import Agent

        with tempfile.TemporaryDirectory(prefix="tuneproof-training-") as folder, _quiet_agent():
            work_path = Path(folder) / "work.pickle"
            work_path.write_bytes(pickle.dumps(work))
            agent = Agent(work, work_path, report)
            agent.run_to_end()
        if agent.error is not None:
            raise agent.error
        if registry.why_incomplete(work.model_dir) is not None:
            raise TrainingError(
                f"the processes of the training have ended, but {work.model_dir} is not complete",
                "run the same command again: it goes on from the newest checkpoint",
            )
        return registry.read_manifest(work.model_dir)

    def dismiss(self) -> None:
        """Nobody waits: processes are begun with their work."""


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Our own log says what a person needs of the agent's."""
    loggers = [logging.getLogger(name) for name in _AGENT_LOGGERS]
    before = [one.level for one in loggers]
    events = logging.getLogger(_EVENTS_LOGGER)  # the agent sets its level itself
    for one in loggers:
        one.setLevel(logging.CRITICAL + 1)
    events.disabled = True
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
        events.disabled = False
