"""Answers to scores, scores to a report."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.evaluation.outputs import EvaluationFiles
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.interruption import keeps, way_on
from tasks.evaluator import Evaluator
from tasks.server.devices import held_device
from tasks.server.secret_blocks import judge_key_of
from tasks.ui.artifacts import show_file, show_lineage, show_scores
from tasks.ui.assets import record_scores
from tasks.ui.progress import shown_progress

logger = logging.getLogger(__name__)


def check_evaluation(evaluator: Evaluator) -> None:
    """Raise a TuneproofError for settings that an evaluation would refuse, or a judge's endpoint that is not there."""
    evaluator.judge_api_key = evaluator.judge_api_key or judge_key_of(evaluator.settings)
    evaluator.check()
    evaluator.models().probe()


@task(cache_policy=NO_CACHE, persist_result=False)
def score_predictions(evaluator: Evaluator) -> EvaluationSummary:
    """Score the run, compare it with its baseline, write scores and summary; show both."""
    evaluator.judge_api_key = evaluator.judge_api_key or judge_key_of(evaluator.settings)
    run_name = evaluator.find_runs().candidate_path.stem
    keeps(lambda: f"the answers of {run_name} are kept, and what a judge has said; {way_on()} goes on")
    with ExitStack() as stack:
        if evaluator.settings.uses_a_local_model:  # it may take the GPU that another run is using
            stack.enter_context(held_device("auto", evaluator.config.pipeline.gpu_concurrency_limit))
        if evaluator.settings.judged_metrics:
            shown = shown_progress("judging", run_name)
            evaluator.on_progress = stack.enter_context(shown)
        summary = evaluator.score()
    candidate, verdict = summary.candidate, summary.verdict
    names = ", ".join(metric.name for metric in candidate.metrics)
    told = f": {verdict.decision}" if verdict else ""
    logger.info("scored %d rows of %s by %s%s", candidate.rows, candidate.run_name, names, told)
    show_scores(candidate.run_name, summary)
    return summary


@task(cache_policy=NO_CACHE, persist_result=False)
def write_report(evaluator: Evaluator, summary: EvaluationSummary) -> EvaluationFiles:
    """Write the report and the spreadsheet from the scores that are there; link to both, show the lineage."""
    files, run_name = evaluator.report(), summary.candidate.run_name
    show_file("report", run_name, files.report_path, evaluator.runs)
    show_file("spreadsheet", run_name, files.spreadsheet_path, evaluator.runs)
    show_lineage(summary, files.directory)
    record_scores(files.directory, summary)
    return files
