"""The model into memory."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.inferencer import Inferencer
from tasks.server.retrying import RETRIES, RETRY_DELAYS_SECONDS, retry_if_passing


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=retry_if_passing,
)
def load_model_and_tokenizer(inferencer: Inferencer) -> None:
    """Load the discovered model; it stays in this process, with the inferencer."""
    inferencer.load_model_and_tokenizer()
