"""Processes that torchrun (or what sets its variables) has started, on one machine or several, train together.

The first of them does what a single process does, Prefect included; the others `follow`: they wait until it has read
settings and rows, and are given the work.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar

from tasks.core.errors import TrainingError
from tasks.core.records import ModelManifest, TrainingRestart
from tasks.core.training import checkpoints
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.rank import joined_group, restart_count, train_share
from tasks.core.training.processes.work import Report, TrainingWork

if TYPE_CHECKING:
    from tasks.core.config import FineTunerConfig

logger = logging.getLogger(__name__)

_WORK_KEY = "tuneproof/work"
_COMES, _NONE = "comes", "none"
_WATCH_SECONDS = 1.0
_LONGEST_WAIT = timedelta(days=30)  # for rows that are read and checked first


class Joined:
    """The first process of those that were started. They train once: the others end with their training."""

    sends_checkpoints: ClassVar[bool] = False

    _has_trained = False

    def __init__(self, config: FineTunerConfig) -> None:
        if Joined._has_trained:
            raise TrainingError(
                "the other processes that torchrun has started have ended with the training before this one",
                "start the command again; give torchrun --max-restarts so that it does so by itself",
            )
        Joined._has_trained = True
        _end_with_launcher()
        self._group = ExitStack()
        self._group.enter_context(joined_group(_device(config)))
        self._is_told = False

    def train(self, work: TrainingWork, report: Report | None = None) -> ModelManifest:
        """See `Trainers`."""
        from torch import distributed

        work = replace(work, group_id=_run_id())
        self._note_restart(work)
        self._tell(_COMES)
        distributed.broadcast_object_list([work], src=0)
        manifest = train_share(work, report)
        if manifest is None:
            raise ConnectionError(
                "another process of the training has ended with an error; its log says which"
            )
        return manifest

    def dismiss(self) -> None:
        """See `Trainers`."""
        if not self._is_told:
            self._tell(_NONE)
        self._group.close()

    def _tell(self, what: str) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        _get_default_store().set(_WORK_KEY, what)
        self._is_told = True

    def _note_restart(self, work: TrainingWork) -> None:
        """Torchrun says how often it has begun the group again, and not why."""
        checkpoints_dir = work.model_dir / checkpoints.CHECKPOINTS
        journal, count = Journal.of(checkpoints_dir, work.group_id, tidies=True), restart_count()
        if count == 0:
            journal.forget()
        elif count > len(journal.restarts):
            newest = checkpoints.newest_whole(checkpoints_dir)
            step = 0 if newest is None else checkpoints.step_of(newest)
            journal.note(TrainingRestart(cause="torchrun began the group again", step=step))


def follow(config: FineTunerConfig) -> None:
    """Be one of the others: wait for the work, train this process's share, and write nothing.

    Raises what a training raises, where this process has it to tell.
    """
    from torch import distributed
    from torch.distributed.distributed_c10d import _get_default_store

    logging.getLogger("tasks").setLevel(logging.ERROR)  # what all processes would say, one says
    _end_with_launcher()
    with joined_group(_device(config)):
        store = _get_default_store()
        store.wait([_WORK_KEY], _LONGEST_WAIT)
        if store.get(_WORK_KEY).decode() == _NONE:
            logger.info("there is nothing to train")
            return
        held: list[TrainingWork | None] = [None]
        distributed.broadcast_object_list(held, src=0)
        assert held[0] is not None
        train_share(held[0])


def _end_with_launcher() -> None:
    """Ask this process to end when torchrun is gone: it cannot end its processes itself when it is killed."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _device(config: FineTunerConfig) -> str:
    from tasks.core.models.placement import choose_device

    return choose_device(config.device)


def _run_id() -> str:
    """What the tries of one torchrun have in common."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "joined")
    return "".join(letter if letter.isalnum() else "-" for letter in name)
