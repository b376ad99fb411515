"""Training rows to a model directory."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.config import Config
from tasks.finetuner import FineTune, training_text
from tasks.server.retrying import RETRIES, RETRY_DELAYS_SECONDS, retry_if_passing
from tasks.ui.artifacts import show_losses, show_prompts
from tasks.ui.assets import record_model
from tasks.ui.progress import shown_progress

if TYPE_CHECKING:
    from tasks.core.training.run import TrainedModel, TrainingProgress


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=retry_if_passing,
)
def train_model(config: Config, started_at: datetime | None = None) -> TrainedModel:
    """Fine-tune, or finish what was interrupted; a retry goes on from the newest checkpoint."""
    with shown_progress("training", config.fine_tuner.full_run_name("model")) as show:

        def report(progress: TrainingProgress) -> None:
            show(progress.step, progress.total_steps, training_text(progress))

        trained = FineTune(config, on_progress=report, started_at=started_at).run()
    show_prompts(trained.manifest.run_name, config.fine_tuner)
    show_losses(trained.manifest)
    record_model(trained.model_dir, trained.manifest)
    return trained
