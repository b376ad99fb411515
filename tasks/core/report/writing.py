"""All files of an evaluation: what was found is scored, told in a report and a spreadsheet, and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.evaluate import evaluation_files, score_run
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.metrics.models.scoring_models import ScoringModels
from tasks.core.records import ModelManifest
from tasks.core.report.report import write_report
from tasks.core.report.row_view import RowView, row_views
from tasks.core.report.spreadsheet import write_spreadsheet

if TYPE_CHECKING:
    from tasks.core.config import EvaluatorConfig


def report_run(candidate_dir: Path, files: EvaluationFiles | None = None) -> EvaluationFiles:
    """Write `report.html` and the spreadsheet from the files that `score_run` left, which may lie elsewhere.

    Raises EvaluationError when there are no scores, or answers, scores and summary are not of one evaluation.
    """
    files = files or evaluation_files(candidate_dir)
    summary = read_summary(files.summary_path)
    predictions_path = files.directory / summary.candidate.predictions_path
    baseline_path = files.directory / summary.baseline.predictions_path if summary.baseline else None
    _refuse_mixture(files, summary)

    def rows() -> Iterator[RowView]:
        markers = summary.settings.thought_markers
        return row_views(predictions_path, baseline_path, files.scores_path, markers)

    write_spreadsheet(files.spreadsheet_path, summary, rows())
    write_report(files.report_path, summary, rows())
    return files


def _refuse_mixture(files: EvaluationFiles, summary: EvaluationSummary) -> None:
    """Raise EvaluationError where a file that a report is made of is not the one that the summary tells of."""
    told: list[tuple[Path, str | None]] = [(files.scores_path, summary.scores_sha256)]
    for run in (summary.candidate, summary.baseline):
        if run is not None:
            told.append((files.directory / run.predictions_path, run.predictions_sha256))
    for path, sha256 in told:
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise EvaluationError(
                f"{path} cannot be read: {error.strerror or error}", "run `tuneproof evaluate` again"
            ) from error
        if sha256 not in (None, found):
            raise EvaluationError(
                f"{path} is not the file that {files.summary_path.name} tells of: an evaluation was interrupted, "
                "or the file was changed",
                "run `tuneproof evaluate` again; no answer is generated again",
            )


def compare_runs(
    before_path: Path,
    after_path: Path,
    config: EvaluatorConfig,
    *,
    directory: Path | None = None,
    model_manifest: ModelManifest | None = None,
    models: ScoringModels | None = None,
) -> tuple[EvaluationSummary, EvaluationFiles]:
    """Score two runs anew, compare them, write all files of an evaluation; no verdict.

    They go into `directory`, by default `compared-with-<before>` beside the answers of `after_path`; what
    `evaluate` wrote for either run stays. `models` are those that metrics may ask for. Raises EvaluationError when
    both are the same run or share no rows.
    """
    if before_path.resolve() == after_path.resolve():
        raise EvaluationError(f"{before_path} and {after_path} are the same run", "name two different runs")
    name = before_path.stem if before_path.is_file() else before_path.resolve().name
    files = EvaluationFiles(directory or evaluation_files(after_path).directory / f"compared-with-{name}")
    summary = score_run(after_path, before_path, config, model_manifest, files=files, models=models)
    return summary, report_run(after_path, files)
