"""Which model answers, and which one it is compared with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.config import Config, InferencerConfig
from tasks.core.errors import ModelNotFoundError
from tasks.core.evaluation.opponents.run_lookup import OpponentModel, find_baseline, find_champion
from tasks.core.records import RunManifest
from tasks.core.storage.store import Store
from tasks.inferencer import Inferencer
from tasks.server.retrying import RETRIES, RETRY_DELAYS_SECONDS, retry_if_passing

if TYPE_CHECKING:
    from tasks.core.models.trained.discovery import Discovery

logger = logging.getLogger(__name__)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=retry_if_passing,
)
def discover_model(inferencer: Inferencer) -> Discovery:
    """Find the model that answers; its reason is logged."""
    return inferencer.discover()


@task(cache_policy=NO_CACHE, persist_result=False)
def discover_baseline(candidate: RunManifest, settings: InferencerConfig) -> OpponentModel | None:
    """Find the base model of the one that answered; None when it has none."""
    baseline = find_baseline(candidate, settings)
    if baseline is None:
        logger.info("%s is no fine-tuned model: no base to compare with", candidate.identity.model.model_id)
    return baseline


@task(cache_policy=NO_CACHE, persist_result=False)
def discover_champion(candidate: RunManifest, config: Config) -> OpponentModel | None:
    """Find the promoted model; None when there is none, or when its files are gone, which the verdict tells."""
    try:
        return find_champion(
            candidate,
            config.inferencer,
            models_dir=Store(config.pipeline.models_dir).local,
            runs_dir=Store(config.pipeline.runs_dir).local,
        )
    except ModelNotFoundError as error:
        logger.warning("%s", error)
        return None
