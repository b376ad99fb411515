"""finetune-infer-evaluate: the whole job, each phase a flow of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from flows.cli.console import TOLD_BY_COMMAND
from flows.evaluation import Answered, evaluate
from flows.finetuning import finetune
from flows.inference import infer, infer_with_base_model, infer_with_champion
from flows.naming import name_of_run, rename_run
from flows.parameters import ConfigSource, Count, Phases, Settings, Text, chosen_phases, load_settings
from flows.promotion import promote_if_decided
from flows.server.steady import SteadyFlow
from tasks.answering import check_inference
from tasks.core.config import Config
from tasks.core.evaluation.evaluate import evaluation_files
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.interruption import goes_on_by
from tasks.core.models.trained.registry import MANIFEST_NAME
from tasks.core.promotion.promotion import Promotion
from tasks.core.records import RunManifest
from tasks.core.storage.store import Store
from tasks.evaluator import Evaluator
from tasks.scoring import check_evaluation
from tasks.server.events import emit_model_trained, emit_predictions_ready
from tasks.ui.artifacts import show_file, show_lineage, show_scores
from tasks.ui.run_logs import send_core_logs_to_prefect

if TYPE_CHECKING:
    from tasks.core.training.run import TrainedModel

logger = logging.getLogger("tasks.pipeline")


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """What the phases gave; None for a phase that was left out."""

    trained: TrainedModel | None = None
    candidate: RunManifest | None = None
    baseline: RunManifest | None = None
    champion: RunManifest | None = None
    evaluation: EvaluationSummary | None = None
    promotion: Promotion | None = None


@SteadyFlow.of
@flow(name="finetune-infer-evaluate", flow_run_name=name_of_run)
def finetune_infer_evaluate(
    config: ConfigSource = "",
    phases: Phases = "as configured",
    model: Text = "",
    dataset: Text = "",
    test_dataset: Text = "",
    run_name: Text = "",
    max_rows: Count = 0,
    settings: Settings = (),
) -> PipelineResult:
    """Fine-tune a model, let it, its base and the champion answer the same questions, promote it if it is better.

    Args:
        config: TOML file with settings; empty = ./config.toml if there is one.
        phases: Which parts of the job run.
        model: Folder, Hub id or package: name of the base model; empty = as configured.
        dataset: Hub id, JSONL, JSON, CSV or Parquet file, or a folder with the training rows; empty = as configured.
        test_dataset: The same for the test questions.
        run_name: Name of the fine-tuned model and its folder; empty = made of base model and time.
        max_rows: Use only the first test questions; 0 = as configured.
        settings: Any other setting as section.key=value, e.g. fine_tuner.epochs=2; beats the file.
    """
    send_core_logs_to_prefect()
    loaded = load_settings(
        config,
        settings,
        fine_tuner__base_model_id=model,
        fine_tuner__training_data_id=dataset,
        fine_tuner__run_name=run_name,
        inferencer__testing_data_id=test_dataset,
        inferencer__max_rows=max_rows,
        **chosen_phases(phases),
    )
    chosen = loaded.pipeline
    # What inference and evaluation would refuse is refused before hours of training, not after.
    if chosen.enable_finetuning and chosen.enable_inference and not chosen.stop_after_finetuning:
        check_inference(loaded, is_next=True)
    if chosen.enable_evaluation and not (chosen.stop_after_finetuning or chosen.stop_after_inference):
        check_evaluation(Evaluator(loaded))
    trained = candidate = baseline = champion = evaluation = promotion = None
    if chosen.enable_finetuning:
        trained = finetune(loaded)
        if loaded.fine_tuner.run_name is None:  # the same command would train another model
            goes_on_by("the same command with --skip-finetuning")
    if chosen.enable_inference and not chosen.stop_after_finetuning:
        candidate = infer(loaded, model=None if trained is None else str(trained.model_dir))
        baseline = infer_with_base_model(loaded, candidate) if chosen.compare_with_base else None
        champion = infer_with_champion(loaded, candidate)
    if chosen.enable_evaluation and not (chosen.stop_after_finetuning or chosen.stop_after_inference):
        opponents = Answered(tuple(_run_path(loaded, run) for run in (baseline, champion) if run is not None))
        evaluation = evaluate(loaded, run=_folder(loaded, candidate), baseline=opponents)
        promotion = promote_if_decided(loaded, evaluation)
    _log_what_was_left_out(trained, candidate, evaluation)
    _show_results(loaded, trained, candidate, evaluation)
    _name_after_result(trained, candidate, evaluation)
    if evaluation is None:
        _let_others_go_on(loaded, trained, candidate)
    return PipelineResult(trained, candidate, baseline, champion, evaluation, promotion)


def _folder(config: Config, run: RunManifest | None) -> str | None:
    return None if run is None else Store(config.pipeline.runs_dir).address_of(run.run_name)


def _run_path(config: Config, run: RunManifest) -> Path:
    return Store(config.pipeline.runs_dir).local / run.run_name


def _show_results(
    config: Config,
    trained: TrainedModel | None,
    candidate: RunManifest | None,
    evaluation: EvaluationSummary | None,
) -> None:
    """Show on this run's own page what the phases gave: it has none of the artifacts of its subflows."""
    models, runs = Store(config.pipeline.models_dir), Store(config.pipeline.runs_dir)
    if trained is not None:
        show_file("model", trained.manifest.run_name, trained.model_dir / MANIFEST_NAME, models)
    if candidate is not None:
        predictions_path = runs.local / candidate.run_name / candidate.predictions_path
        show_file("predictions", candidate.run_name, predictions_path, runs)
    if evaluation is None:
        return
    path = Evaluator(config).candidate_path() if candidate is None else _run_path(config, candidate)
    files = evaluation_files(path)
    show_scores(evaluation.candidate.run_name, evaluation)
    show_file("report", evaluation.candidate.run_name, files.report_path, runs)
    show_file("spreadsheet", evaluation.candidate.run_name, files.spreadsheet_path, runs)
    show_lineage(evaluation, files.directory)
    verdict = evaluation.verdict
    told = f"verdict: {verdict.decision.upper()}. {verdict.reasons[0]}" if verdict else evaluation.answer
    logger.info(told, extra=TOLD_BY_COMMAND)


def _let_others_go_on(config: Config, trained: TrainedModel | None, candidate: RunManifest | None) -> None:
    """Emit what the last phase gave as the event that starts the next deployment; all answers are there by now."""
    if candidate is not None:
        runs = Store(config.pipeline.runs_dir)
        emit_predictions_ready(runs.url_of(runs.local / candidate.run_name), candidate)
    elif trained is not None:
        emit_model_trained(Store(config.pipeline.models_dir).url_of(trained.model_dir), trained.manifest)


def _name_after_result(
    trained: TrainedModel | None, candidate: RunManifest | None, evaluation: EvaluationSummary | None
) -> None:
    told = [] if trained is None else [trained.manifest.run_name]
    if evaluation is not None:
        told += [] if told else [evaluation.candidate.run_name]
        told += [evaluation.verdict.decision] if evaluation.verdict else []
    elif candidate is not None:
        told.append(candidate.run_name)
    if told:
        rename_run(*told)


def _log_what_was_left_out(*results: object) -> None:
    for phase, result in zip(("fine-tuning", "inference", "evaluation"), results, strict=True):
        if result is None:
            logger.info("%s was left out, as configured", phase)
