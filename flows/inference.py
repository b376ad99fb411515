"""infer: test rows -> answers in a run directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from prefect import flow

from flows.naming import name_of_run, rename_run, told_rows
from flows.outcomes import already_done
from flows.parameters import (
    ConfigSource,
    Count,
    Quantization,
    Settings,
    Temperature,
    Text,
    chosen_quantization,
    load_settings,
)
from flows.server.steady import SteadyFlow
from tasks.answering import (
    answer_rows,
    discover_baseline,
    discover_champion,
    discover_model,
    is_repeated,
    process_dataset,
    publish_predictions,
    repeat_some_rows,
    show_predictions,
)
from tasks.core.config import Config
from tasks.core.errors import NoAnswerError
from tasks.core.evaluation.noise import find_repeat
from tasks.core.evaluation.opponents.run_lookup import OpponentModel
from tasks.core.generation.plan import RunPlan
from tasks.core.models.trained.registry import data_slug, slug
from tasks.core.records import RunManifest
from tasks.core.runs.published import refuse_without_answers
from tasks.inferencer import Inferencer
from tasks.memory_budgets import PrefectBudgetStore
from tasks.server.devices import held_device
from tasks.server.events import emit_predictions_ready
from tasks.ui.run_logs import send_core_logs_to_prefect

logger = logging.getLogger("tasks.inference")

# The noise is measured on the candidate only.
_ANSWERED_ONCE = "gate.noise_rows=0"


@SteadyFlow.of
@flow(name="infer", flow_run_name=name_of_run)
def infer(
    config: ConfigSource = "",
    model: Text = "",
    dataset: Text = "",
    run_name: Text = "",
    max_rows: Count = 0,
    max_new_tokens: Count = 0,
    temperature: Temperature = None,
    quantization: Quantization = "as configured",
    compare_with_base: bool = False,
    settings: Settings = (),
) -> RunManifest:
    """Let a model answer the test questions. A run that was interrupted goes on; a finished one is reused.

    A run in which every row ended in an error is published and fails.

    Args:
        config: TOML file with settings; empty = ./config.toml if there is one.
        model: Folder, Hub id or package: name of the model; empty = the newest fine-tuned one.
        dataset: Hub id, JSONL, JSON, CSV or Parquet file, or a folder with the test questions; empty = as configured.
        run_name: Name of the run and its folder; empty = made of model and dataset.
        max_rows: Use only the first rows of the dataset; 0 = as configured.
        max_new_tokens: Longest answer, in tokens; 0 = as configured (512 unless the file says otherwise).
        temperature: Randomness of the answers, 0 to 10; 0 = always the likeliest token; none = as configured.
        quantization: Bits of the weights in memory; fewer need less memory and answer a little worse.
        compare_with_base: Then also let the model that this one was fine-tuned from, and the champion, answer.
        settings: Any other setting as section.key=value, e.g. inferencer.top_p=0.9; beats the file.
    """
    send_core_logs_to_prefect()
    given: dict[str, object] = {
        "model": model,
        "testing_data_id": dataset,
        "run_name": run_name,
        "max_rows": max_rows,
    }
    given |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    named = {f"inferencer__{key}": value for key, value in given.items()}
    loaded = load_settings(config, settings, **named, **chosen_quantization(quantization))
    return _infer(Inferencer(loaded, budget_store=PrefectBudgetStore()), compare_with_base=compare_with_base)


def _infer(inferencer: Inferencer, *, compare_with_base: bool) -> RunManifest:
    discover_model(inferencer)
    plan = process_dataset(inferencer)
    rename_run(*_telling(plan, inferencer.settings.testing_data_id))
    found = inferencer.finished(plan)
    if found is None:
        manifest = _generate(inferencer, plan)
    else:
        manifest = found
        show_predictions(plan, manifest)
        if manifest.error_count < manifest.row_count:
            _measure_noise_if_missing(inferencer, plan, manifest)
    refuse_without_answers(plan.run.predictions_path, manifest)
    if compare_with_base:
        infer_with_base_model(inferencer.config, manifest)
        infer_with_champion(inferencer.config, manifest)
    emit_predictions_ready(inferencer.runs.url_of(plan.run.path), manifest)
    if found is not None:
        what = f"{plan.run.path} is complete ({manifest.row_count} rows): nothing to generate"
        return already_done(what, manifest)
    return manifest


def _telling(plan: RunPlan, dataset: str | Sequence[str] | None) -> tuple[str, ...]:
    """Model, dataset and number of rows."""
    identity = plan.identity
    return slug(identity.model.model_id), data_slug(dataset or "rows"), told_rows(identity.row_count)


def _generate(inferencer: Inferencer, plan: RunPlan) -> RunManifest:
    """Answer what is missing and publish, alone on the GPU."""
    settings, limit = inferencer.settings, inferencer.config.pipeline.gpu_concurrency_limit
    with held_device(settings.device, limit, all_of_them=settings.num_shards > 1):
        try:
            manifest = publish_predictions(inferencer, plan, answer_rows(inferencer, plan))
            if manifest.error_count < manifest.row_count:
                repeat_some_rows(inferencer, plan, manifest)
        finally:
            inferencer.release_model()
    return manifest


def _measure_noise_if_missing(inferencer: Inferencer, plan: RunPlan, manifest: RunManifest) -> None:
    """Repeat some rows of a finished run whose process ended before it did."""
    if find_repeat(plan.run.path) is None and is_repeated(plan, manifest):
        with held_device(inferencer.settings.device, inferencer.config.pipeline.gpu_concurrency_limit):
            repeat_some_rows(inferencer, plan, manifest)


def infer_with_base_model(config: Config, candidate: RunManifest) -> RunManifest | None:
    """Let the candidate's base model answer the same rows; None when the candidate has no base."""
    return _infer_with_opponent(config, discover_baseline(candidate, config.inferencer))


def infer_with_champion(config: Config, candidate: RunManifest) -> RunManifest | None:
    """Let the promoted model answer the same rows, unless it has; None when there is none."""
    compares = config.pipeline.compare_with_champion
    return _infer_with_opponent(config, discover_champion(candidate, config) if compares else None)


def _infer_with_opponent(config: Config, opponent: OpponentModel | None) -> RunManifest | None:
    """Let an opponent answer; None when it answers nothing, which must not hide the candidate's answers."""
    if opponent is None or opponent.finished is not None:
        return None if opponent is None else opponent.finished
    revision = f"inferencer.model_revision={opponent.revision or 'null'}"
    settings = (revision, f"inferencer.dtype={opponent.dtype}", _ANSWERED_ONCE)
    try:
        manifest: RunManifest = infer(
            config, model=opponent.model_id, run_name=opponent.run_name, settings=settings
        )
    except NoAnswerError as error:
        logger.error("%s", error)
        return None
    return manifest
