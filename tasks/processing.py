"""Dataset rows to rows of a run."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import before_training
from tasks.core.config import Config
from tasks.inferencer import Inferencer, PreparedRows
from tasks.server.retrying import RETRIES, RETRY_DELAYS_SECONDS, retry_if_passing

_READING: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS_SECONDS,
    "retry_condition_fn": retry_if_passing,
}


@task(**_READING)
def check_inference(config: Config, *, is_next: bool) -> None:
    """Raise what inference would refuse after the training, see `tasks.before_training`."""
    before_training.check_inference(config, is_next=is_next)


@task(**_READING)
def process_dataset(inferencer: Inferencer) -> PreparedRows:
    """Open the test data, map its columns and bind the rows to their run directory."""
    return inferencer.process_dataset(inferencer.load_dataset())
