"""A verdict to the promoted model."""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.promotion.promotion import Promotion
from tasks.promoter import Promoter
from tasks.server.events import emit_model_promoted
from tasks.ui.artifacts import show_promotion

logger = logging.getLogger(__name__)


@task(cache_policy=NO_CACHE, persist_result=False)
def promote_model(promoter: Promoter, summary: EvaluationSummary, *, reason: str | None = None) -> Promotion:
    """Make the evaluated model the promoted one; with a person's `reason`, whatever the verdict."""
    promotion = promoter.promote_evaluated(summary, reason=reason)
    logger.info("%s is promoted; `tuneproof rollback` goes back", promotion.run_name)
    emit_model_promoted(promoter.models.url_of(promoter.models_dir / promotion.run_name), promotion)
    show_promotion(promotion)
    return promotion
