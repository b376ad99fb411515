"""Scores to a report."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.evaluation.outputs import EvaluationFiles
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.evaluator import Evaluator
from tasks.ui.artifacts import show_file, show_lineage
from tasks.ui.assets import record_scores


@task(cache_policy=NO_CACHE, persist_result=False)
def write_report(evaluator: Evaluator, summary: EvaluationSummary) -> EvaluationFiles:
    """Write the report and the spreadsheet from the scores that are there; link to both, show the lineage."""
    files, run_name = evaluator.report(), summary.candidate.run_name
    show_file("report", run_name, files.report_path, evaluator.runs)
    show_file("spreadsheet", run_name, files.spreadsheet_path, evaluator.runs)
    show_lineage(summary, files.directory)
    record_scores(files.directory, summary)
    return files
