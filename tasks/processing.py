"""Dataset rows to rows of a run."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.inferencer import Inferencer, PreparedRows
from tasks.retrying import RETRIES, RETRY_DELAYS_SECONDS, retry_if_passing

_READING: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS_SECONDS,
    "retry_condition_fn": retry_if_passing,
}


@task(**_READING)
def check_dataset(inferencer: Inferencer) -> None:
    """Open the test data and map the first row's columns. Raises DataError, ConfigError when none is named."""
    next(inferencer.examples(inferencer.load_dataset()), None)


@task(**_READING)
def process_dataset(inferencer: Inferencer) -> PreparedRows:
    """Open the test data, map its columns and bind the rows to their run directory."""
    return inferencer.process_dataset(inferencer.load_dataset())
