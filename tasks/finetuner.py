"""FineTune: from training rows to a model directory, as a plain class that the Prefect task uses too."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.config import Config, FineTunerConfig, as_config
from tasks.core.models.trained.model_store import bring_manifests
from tasks.core.storage.store import Store
from tasks.ui.terminal_bar import left_text, terminal_bar

if TYPE_CHECKING:
    from tasks.core.records import ModelManifest
    from tasks.core.training.run import TrainedModel, TrainingProgress

logger = logging.getLogger(__name__)

OnProgress = Callable[["TrainingProgress"], None]


class FineTune:
    """Fine-tunes the section [fine_tuner] of a configuration.

    `config_manager` is a Config, the path of a TOML file, or None for ./config.toml and defaults. `run_name`
    overrides the config's; without either, base model and time make the name (`started_at`, or now). Progress goes
    to `on_progress`, or to a bar on the terminal where there is one.
    """

    def __init__(
        self,
        config_manager: Config | Path | str | None = None,
        *,
        run_name: str | None = None,
        on_progress: OnProgress | None = None,
        started_at: datetime | None = None,
    ) -> None:
        self.config = as_config(config_manager)
        self._run_name = run_name
        self.on_progress = on_progress
        self._started_at = started_at

    @property
    def settings(self) -> FineTunerConfig:
        """The section [fine_tuner]."""
        return self.config.fine_tuner

    def run(self) -> TrainedModel:
        """Train, or finish an interrupted training, or return the model if this very training was done before.

        Raises ConfigError, DataError, ModelNotFoundError, ModelLoadError, RunKeyMismatchError, RunLockedError,
        OutOfMemoryError, TrainingError, StorageError.
        """
        from tasks.core.training.remote.trainings import RemoteTrainings
        from tasks.core.training.run import train

        models = Store(self.config.pipeline.models_dir)
        bring_manifests(models)  # the new one stands after all that are there
        with self._shown_progress() as on_progress:
            return train(
                self.settings,
                models_dir=models.local,
                run_name=self._run_name,
                on_progress=on_progress,
                started_at=self._started_at,
                home=RemoteTrainings(models, self.settings.save_total_limit) if models.is_remote else None,
            )

    @contextmanager
    def _shown_progress(self) -> Iterator[OnProgress | None]:
        if self.on_progress is not None or not sys.stderr.isatty():
            yield self.on_progress
        else:
            with terminal_bar("training") as show:
                yield lambda progress: show(progress.step, progress.total_steps, training_text(progress))


def training_text(progress: TrainingProgress) -> str:
    """Give `update 20 of 96, loss 0.312, validation 0.401, 1:20 left`, as far as it is known."""
    update = f"update {progress.step} of {progress.total_steps}"
    return ", ".join(filter(None, (update, losses_text(progress), left_text(progress.eta_seconds))))


def losses_text(progress: TrainingProgress) -> str:
    """Give `loss 0.312, validation 0.401`, as far as they are known."""
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.validation_loss is not None:
        parts.append(f"validation {progress.validation_loss:.3f}")
    return ", ".join(parts)


def best_text(manifest: ModelManifest) -> str:
    """Give `, best validation loss 0.401 at update 80: the model; …`; nothing where nothing was validated."""
    if manifest.best_validation_loss is None:
        return ""
    best = f", best validation loss {manifest.best_validation_loss:.3f} at update {manifest.best_step}: the model"
    return best + (f"; stopped early, planned {manifest.planned_steps}" if manifest.stopped_early else "")
