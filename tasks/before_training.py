"""What inference would refuse after a training, found before it: hours of work must not end at a name or a length."""

from __future__ import annotations

from tasks.core.config import Config, InferencerConfig
from tasks.core.errors import RunKeyMismatchError
from tasks.core.generation.settings import column_mapping
from tasks.core.generation.settings import run_name as run_name_of
from tasks.core.storage.store import Store

SOME_TIME = "00000000-000000"
"""Stands in a name for the time at which a training will begin."""
_SOME_KEY = "0" * 8


def trained_name(config: Config, time: str = SOME_TIME) -> str:
    """Give the name that the model to be trained will have. Raises ConfigError for a bad one."""
    from tasks.core.models.trained.registry import model_dir
    from tasks.core.training.run import name_of_training

    return model_dir(Store(config.pipeline.models_dir).local, name_of_training(config.fine_tuner, time)).name


def check_names(config: Config) -> None:
    """Raise ConfigError for a name that the run of the model to be trained, or of its opponents, cannot have."""
    from tasks.core.data.sources import described_data
    from tasks.core.models.trained.registry import slug

    settings = config.inferencer
    run_name_of(settings, None, trained_name(config))
    tested_on = slug(described_data(settings.required_testing_data_id))
    opponent = f"{slug(config.fine_tuner.base_model_id)}-{tested_on}-{_SOME_KEY}"
    if config.pipeline.compare_with_base or config.pipeline.compare_with_champion:
        run_name_of(settings, opponent, config.fine_tuner.base_model_id)


def check_inference(config: Config, *, is_next: bool) -> None:
    """Raise what inference would raise over names, champion, rows, columns, lengths and device; loads no weights.

    `is_next` says that inference follows at once, so that a run directory of other answers is in its way too.
    """
    check_names(config)
    check_champion(config)
    if is_next:
        check_run_is_free(config)
    check_rows(config.inferencer)
    check_lengths(config)


def check_champion(config: Config) -> None:
    """Raise ModelLoadError when the trained model is to be compared with a champion that nobody can be sure of."""
    from tasks.core.models.trained.champion import current_champion, refuse_changed

    models = Store(config.pipeline.models_dir)
    champion = current_champion(models)
    if champion is not None and config.pipeline.compare_with_champion:
        refuse_changed(models, champion)


def check_run_is_free(config: Config) -> None:
    """Raise RunKeyMismatchError when the run belongs to other weights; a finished training is taken for this one."""
    from tasks.core.models.trained.registry import why_incomplete
    from tasks.core.runs.run_dir import RunDir

    models, runs = Store(config.pipeline.models_dir), Store(config.pipeline.runs_dir)
    name = config.fine_tuner.run_name
    is_trained = (
        name is not None and why_incomplete(models.local / config.fine_tuner.full_run_name("")) is None
    )
    if is_trained or models.is_remote or runs.is_remote:
        return
    run = RunDir(runs.local / run_name_of(config.inferencer, None, trained_name(config)))
    if run.identity_path.exists():
        raise RunKeyMismatchError(
            f"{run.path} holds answers of another model, and the model to be trained would answer there too",
            "set another run name (fine_tuner.run_name, inferencer.run_name), leave both unset, or move that "
            "directory away; --skip-finetuning goes on with the model that is there",
        )


def check_rows(settings: InferencerConfig) -> None:
    """Raise DataError when the test rows or their columns are not there."""
    from tasks.core.data.columns import examples
    from tasks.core.data.sources import test_rows

    next(examples(test_rows(settings), column_mapping(settings)), None)


def check_lengths(config: Config) -> None:
    """Raise ConfigError or ModelLoadError for lengths or a device that the trained model cannot have, like its base."""
    from tasks.core.models.context_length import context_length_of, possible_length
    from tasks.core.models.placement import choose_device
    from tasks.core.models.specs import ModelSpec

    trained, settings = config.fine_tuner, config.inferencer
    choose_device(settings.device)
    possible_length(
        context_length_of(ModelSpec.of_base(trained)),
        max_sequence_length=settings.max_sequence_length,
        max_new_tokens=settings.max_new_tokens,
    )
