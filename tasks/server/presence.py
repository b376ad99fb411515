"""Whether what a command names is there: asked before Prefect and the model libraries are imported.

A wrong name is told in a second then. Only files and the Hub's cache are looked at; what needs the network is left to
the phase itself, which tries again when the network fails.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.config import Config
from tasks.core.config.phases import EVALUATION, FINE_TUNING, INFERENCE
from tasks.core.errors import StorageError
from tasks.core.storage.store import is_url

if TYPE_CHECKING:
    from tasks.core.models.trained.discovery import Discovery

_OTHER_PLACE = (
    "set pipeline.models_dir or pipeline.runs_dir to a folder in which you may write, or change its rights"
)


def check_named(
    config: Config, phases: Sequence[str], *, run: str | None = None, baseline: str | None = None
) -> None:
    """Raise a TuneproofError when data, model, metric, run or baseline of these phases is not there."""
    if FINE_TUNING in phases:
        _check_training(config)
    if INFERENCE in phases:
        _check_inference(config, after_training=FINE_TUNING in phases)
    if EVALUATION in phases:
        _check_evaluation(config, run, baseline, after_inference=INFERENCE in phases)


def check_place(place: str) -> None:
    """Raise StorageError when a folder of this machine cannot be written, or made."""
    if is_url(place):
        return
    path = Path(place).absolute()
    try:
        while not path.exists():
            path = path.parent
        path.iterdir()
    except OSError as error:
        raise StorageError(f"{place} cannot be used: {error.strerror}", _OTHER_PLACE) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"{place} cannot be written: {path} is read-only for you", _OTHER_PLACE)


def _check_training(config: Config) -> None:
    from tasks.core.data.sources import check_source
    from tasks.core.models.locating import check_model
    from tasks.core.models.trained.registry import model_dir
    from tasks.core.storage.store import Store

    settings = config.fine_tuner
    check_place(config.pipeline.models_dir)
    if settings.run_name is not None:
        model_dir(Store(config.pipeline.models_dir).local, settings.full_run_name(""))
    check_model(settings.base_model_id)
    check_source(settings.required_training_data_id)
    if settings.validation_data_id is not None:
        check_source(settings.validation_data_id)


def _check_inference(config: Config, *, after_training: bool) -> None:
    from tasks.before_training import check_champion, check_names
    from tasks.core.data.sources import check_source

    check_place(config.pipeline.runs_dir)
    check_source(config.inferencer.required_testing_data_id)
    if after_training:
        check_names(config)
        if not is_url(config.pipeline.models_dir):
            check_champion(config)
    else:
        answering_model(config)


def answering_model(config: Config) -> Discovery | None:
    """Find the model that answers, in silence; None where only the network can tell. Raises ModelNotFoundError."""
    from tasks.core.generation.settings import model_run_names
    from tasks.core.models.locating import is_offline
    from tasks.core.models.trained.discovery import find_model
    from tasks.core.storage.store import Store

    settings = config.inferencer
    is_remote = any(map(is_url, (config.pipeline.models_dir, settings.model or "")))
    if is_remote or (settings.hf_user_id is not None and not is_offline()):
        return None
    return find_model(
        model=settings.model,
        run_names=model_run_names(settings),
        hf_user_id=settings.hf_user_id,
        models_dir=Store(config.pipeline.models_dir).local,
    )


def _check_evaluation(
    config: Config, run: str | None, baseline: str | None, *, after_inference: bool
) -> None:
    from tasks.evaluator import Evaluator

    evaluator = Evaluator(config, run=run, baseline=baseline)
    evaluator.check_metrics()
    evaluator.check_runs(candidate=not after_inference)
