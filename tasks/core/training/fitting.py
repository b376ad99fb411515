"""A training that survives a shortage of memory: smaller pieces of the batch, from the newest checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from tenacity import RetryCallState, Retrying, retry_if_result

from tasks.core.config import FineTunerConfig
from tasks.core.errors import OutOfMemoryError, first_line
from tasks.core.memory.device_memory import is_out_of_memory, release
from tasks.core.records import MemoryEvent
from tasks.core.training.job import BatchPlan, Fitted, Job
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.team import ALONE, Team
from tasks.core.training.processes.work import Report
from tasks.core.training.session import fit_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Shortage:
    """Memory ran out; only the message is kept, since the exception's frames hold the tensors."""

    message: str


class GroupShortageError(Exception):
    """Memory ran out where the other processes wait inside a layer; only a new group can go on."""


def first_plan(config: FineTunerConfig, processes: int) -> BatchPlan:
    """The pieces that the settings ask for."""
    return BatchPlan(
        config.device_train_batch_size,
        config.grad_accumulation,
        config.device_validation_batch_size,
        processes,
    )


def fit(
    job: Job,
    checkpoints_dir: Path,
    team: Team = ALONE,
    report: Report | None = None,
    journal: Journal | None = None,
) -> Fitted:
    """Train; when memory runs out, again from the newest checkpoint with half the rows at once.

    All of a team do so together. Where each holds a part of the model they cannot: the shortage is noted in the
    journal and raised, and the group is begun again. Raises OutOfMemoryError when one row at a time is too much,
    TrainingError, StorageError.
    """
    events = [] if journal is None else list(journal.memory_events)
    plan = first_plan(job.config, team.size)
    for event in events:
        if event.rows == plan.rows_at_once:  # several processes may have noted one shortage
            plan = plan.smaller() or plan

    def attempt() -> Fitted | _Shortage:
        release(job.device)
        try:
            with team.telling():
                fitted = fit_once(job, checkpoints_dir, plan, team, report)
            return replace(fitted, memory_events=tuple(events))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        return _Shortage(message)

    def shrink(state: RetryCallState) -> None:
        nonlocal plan
        assert state.outcome is not None
        shortage: _Shortage = state.outcome.result()
        smaller = plan.smaller()
        if smaller is None:
            raise _one_row_is_too_much(job, shortage.message)
        logger.warning(
            "memory ran out with %d rows at once; going on with %d (a step still has %d rows): %s",
            *(plan.rows_at_once, smaller.rows_at_once, plan.rows_in_update, shortage.message),
        )
        events.append(
            MemoryEvent(
                kind="out_of_memory",
                rows=plan.rows_at_once,
                limit_rows=smaller.rows_at_once,
                message=shortage.message,
            )
        )
        if journal is not None and (team.leads or team.is_shared_out):
            journal.note(events[-1])
        if team.is_shared_out:
            raise GroupShortageError(shortage.message)
        plan = smaller

    retrying = Retrying(
        retry=retry_if_result(lambda result: isinstance(result, _Shortage)), before_sleep=shrink
    )
    return cast(Fitted, retrying(attempt))


def _one_row_is_too_much(job: Job, message: str) -> OutOfMemoryError:
    config = job.config
    return OutOfMemoryError(
        f"memory ran out on {job.device} with one row at a time: {message}",
        f"lower max_sequence_length (now {config.max_sequence_length}) or rank (now {config.rank}), set "
        "use_gradient_checkpointing = true or load_in_4bit = true, or take a smaller base model",
    )
