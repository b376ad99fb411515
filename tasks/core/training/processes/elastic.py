"""Several processes of this machine train, which torch's elastic agent starts, watches and begins again."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tasks.core.children import LogsToParent, end_with_parent, portable
from tasks.core.errors import TrainingError, TuneproofError, first_line
from tasks.core.models.trained import registry
from tasks.core.records import ModelManifest
from tasks.core.training.processes.work import Report, TrainingWork

logger = logging.getLogger(__name__)

_AGENT_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")
_EVENTS_LOGGER = "torchelastic-events-null"


@dataclass(frozen=True, slots=True)
class RankLine:
    """What a process has of its parent: it sends progress and errors, and the first one its logs."""

    messages: Connection
    logs: LogsToParent | None


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that the parent raises: beginning again would not help."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Broke:
    """What a process said before it ended; the group is begun again."""

    cause: str


class Elastic:
    """A group of processes on this machine."""

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


def begin(work_path: str, lines: tuple[RankLine, ...]) -> None:
    """Run in each process of the group, with the environment that the agent has set."""
    from tasks.core.training.processes.rank import take_part

    end_with_parent()
    line = lines[int(os.environ["RANK"])]
    if line.logs is not None:
        line.logs.begin()
    else:  # what all processes would say, one says
        logging.getLogger("tasks").setLevel(logging.CRITICAL)
    try:
        work: TrainingWork = pickle.loads(Path(work_path).read_bytes())
        take_part(work, line.messages.send)
    except TuneproofError as error:
        line.messages.send(Failed(portable(error, TrainingError)))
    except Exception as error:
        logger.debug("a process of the training ends", exc_info=True)
        line.messages.send(Broke(f"{type(error).__name__}: {first_line(error)}"))
        raise


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
