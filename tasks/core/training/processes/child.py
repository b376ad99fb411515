"""A process that the elastic agent has started: what it tells its parent, and how it begins."""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tasks.core.children import LogsToParent, end_with_parent, portable
from tasks.core.errors import TrainingError, TuneproofError, first_line
from tasks.core.models.libraries import import_in_child
from tasks.core.training.processes.work import TrainingWork

logger = logging.getLogger(__name__)


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
    """Why a process ended, as it or those who watch it say; the group is begun again."""

    cause: str
    rank: int | None = None
    is_shortage: bool = False


def begin(work_path: str, lines: tuple[RankLine, ...]) -> None:
    """Run in each process of the group, with the environment that the agent has set."""
    end_with_parent()
    line = lines[int(os.environ["RANK"])]
    if line.logs is not None:
        line.logs.begin()
    else:  # what all processes would say, one says
        logging.getLogger("tasks").setLevel(logging.CRITICAL)
    try:
        import_in_child(trains=True)
        from tasks.core.training.processes.rank import take_part

        work: TrainingWork = pickle.loads(Path(work_path).read_bytes())
        take_part(work, line.messages.send)
    except TuneproofError as error:
        line.messages.send(Failed(portable(error, TrainingError)))
    except Exception as error:
        logger.debug("a process of the training ends", exc_info=True)
        line.messages.send(Broke(f"{type(error).__name__}: {first_line(error)}"))
        raise
