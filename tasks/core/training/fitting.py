"""A training that survives a shortage of memory: smaller pieces of the batch, from the newest checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tenacity import RetryCallState, Retrying, retry_if_result

from tasks.core.errors import OutOfMemoryError, first_line
from tasks.core.memory.device_memory import is_out_of_memory, release
from tasks.core.training.job import BatchPlan, Fitted, Job
from tasks.core.training.session import fit_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Shortage:
    """Memory ran out; only the message is kept, since the exception's frames hold the tensors."""

    message: str


def fit(job: Job, checkpoints_dir: Path) -> Fitted:
    """Train; when memory runs out, again from the newest checkpoint with half the rows at once.

    Raises OutOfMemoryError when one row at a time is too much, TrainingError, StorageError.
    """
    config = job.config
    plan = BatchPlan(
        config.device_train_batch_size, config.grad_accumulation, config.device_validation_batch_size
    )
    events: list[dict[str, Any]] = []

    def attempt() -> Fitted | _Shortage:
        release(job.device)
        try:
            return replace(fit_once(job, checkpoints_dir, plan), memory_events=tuple(events))
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
            raise OutOfMemoryError(
                f"memory ran out on {job.device} with one row at a time: {shortage.message}",
                f"lower max_sequence_length (now {config.max_sequence_length}) or rank (now {config.rank}), set "
                "use_gradient_checkpointing = true or load_in_4bit = true, or take a smaller base model",
            )
        logger.warning(
            "memory ran out with %d rows at once; going on with %d (a step still has %d rows): %s",
            *(plan.micro_batch, smaller.micro_batch, plan.micro_batch * plan.accumulation, shortage.message),
        )
        events.append(
            {
                "event": "out of memory",
                "rows_at_once": plan.micro_batch,
                "next_rows_at_once": smaller.micro_batch,
                "message": shortage.message,
            }
        )
        plan = smaller

    retrying = Retrying(
        retry=retry_if_result(lambda result: isinstance(result, _Shortage)), before_sleep=shrink
    )
    return cast(Fitted, retrying(attempt))
