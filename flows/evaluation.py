"""evaluate: answers -> scores, a comparison with the baseline, a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import WithJsonSchema

from flows.naming import name_of_run, rename_run, told_rows
from flows.outcomes import already_done
from flows.parameters import Confidence, ConfigSource, Settings, Text, load_settings
from flows.promotion import promote_if_decided
from flows.server.steady import SteadyFlow
from tasks.core.evaluation.evaluate import require_verdicts
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.metrics.catalogue import available
from tasks.evaluator import Evaluator
from tasks.scoring import score_predictions, write_report
from tasks.server.events import emit_evaluation_finished
from tasks.ui.run_logs import send_core_logs_to_prefect

Metrics = Annotated[
    tuple[str, ...],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "string", "enum": [family.name for family in available()]},
            "uniqueItems": True,
        }
    ),
]


@dataclass(frozen=True, slots=True)
class Answered:
    """Folders of the runs that a pipeline has let answer, to be compared with."""

    runs: tuple[Path, ...]


# The form asks for a text; a pipeline passes what it has run.
Baseline = Annotated[Answered | Text, WithJsonSchema({"type": "string"})]


@SteadyFlow.of
@flow(name="evaluate", flow_run_name=name_of_run)
def evaluate(
    config: ConfigSource = "",
    run: Text = "",
    baseline: Baseline = "",
    metrics: Metrics = (),
    confidence: Confidence = 0,
    only_new: bool = False,
    promote: bool = False,
    settings: Settings = (),
) -> EvaluationSummary:
    """Score the answers of a run, compare them on the same rows, reach a verdict, write the report.

    Args:
        config: TOML file with settings; empty = ./config.toml if there is one.
        run: Name or folder of the run to score; empty = as configured, else the newest.
        baseline: What to compare with: base (the base model's run), champion, none, a run's name or its folder.
        metrics: What is measured, the first decides; none = as configured. Metrics of your own go into settings.
        confidence: Confidence of the intervals, e.g. 0.95; 0 = as configured.
        only_new: End at once when these very answers were evaluated before, against the same runs, by these settings.
        promote: Then promote the model as pipeline.promote says; a pipeline does that itself.
        settings: Any other setting as section.key=value, e.g. evaluator.metrics=exact_match,f1; beats the file.
    """
    send_core_logs_to_prefect()
    loaded = load_settings(
        config, settings, evaluator__confidence=confidence, evaluator__metrics=metrics or None
    )
    if isinstance(baseline, Answered):
        evaluator = Evaluator(loaded, run=run, opponents=baseline.runs)
    else:
        evaluator = Evaluator(loaded, run=run, baseline=baseline)
    # A retry goes on: the run may have ended after the scores and before what follows them.
    earlier = evaluator.earlier_summary() if only_new and flow_run.run_count < 2 else None
    if earlier is not None:
        return already_done(f"{earlier.candidate.run_name} was evaluated before: nothing to do", earlier)
    summary = score_predictions(evaluator)
    files = write_report(evaluator, summary)
    verdict = summary.verdict
    rename_run(summary.candidate.run_name, verdict.decision if verdict else told_rows(summary.candidate.rows))
    emit_evaluation_finished(evaluator.runs.url_of(files.directory), summary)
    require_verdicts(summary, files.report_path)
    if promote:
        promote_if_decided(loaded, summary)
    return summary
