"""`tuneproof evaluate`: answers to scores, a verdict and a report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.console import say, show_table
from flows.cli.options import NO_COMMON, Common, ConfigPath, Settings
from flows.cli.starting import flow, may_begin, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.core.config import Config
    from tasks.core.evaluation.summary import EvaluationSummary


def evaluate(
    config: ConfigPath = None,
    /,
    *,
    run: Annotated[str | None, Parameter(help="Name or folder of the run, or a file of answers.")] = None,
    baseline: Annotated[
        str | None, Parameter(help="What to compare with; base, champion, none, or like --run.")
    ] = None,
    exit_code: Annotated[
        bool, Parameter(negative=(), help="Exit with 3 for reject, 4 for inconclusive, 5 without a verdict.")
    ] = False,
    common: Common = NO_COMMON,
    settings: Settings = None,
) -> None:
    """Score the answers of a run, compare them, reach a verdict and write the report."""
    loaded = prepare(config, common, settings)
    if not may_begin(loaded, common, "evaluation", run=run, baseline=baseline):
        return None
    summary = flow("flows.evaluation", "evaluate")(loaded, run=run, baseline=baseline)
    show_scores(summary, loaded, run=run)
    return end_with_verdict(summary) if exit_code else None


def show_scores(summary: EvaluationSummary, config: Config, *, run: str | None = None) -> None:
    """Print the scores, before and after if there is a baseline, and where the report is.

    `run` is the name or path that was evaluated, if one was given.
    """
    from tasks.core.evaluation.evaluate import evaluation_files
    from tasks.core.evaluation.opponents.remote_runs import name_within, store_of
    from tasks.core.evaluation.opponents.run_lookup import locate_run
    from tasks.core.evaluation.wording import percent, shown_metric

    candidate, compared = summary.candidate, summary.opponents
    columns = ["metric", *(name for _, name, _, _ in compared), "after" if compared else "score"]
    runs = [*(run for _, _, run, _ in compared), candidate]
    rows = [
        [metric.name, *(shown_metric(run.metric(metric.name)) for run in runs)]
        for metric in candidate.metrics
    ]
    show_verdict(summary)
    intervals = f"{percent(summary.settings.confidence)} intervals"
    show_table(f"{candidate.run_name}: {candidate.rows} rows, {intervals}", columns, rows)
    runs_dir = store_of(run, config.pipeline.runs_dir).local
    named = candidate.run_name if run is None else name_within(run)
    files = evaluation_files(locate_run(named, runs_dir))
    show_finding(summary, files.report_path)


def show_finding(summary: EvaluationSummary, report_path: Path) -> None:
    if summary.verdict is None or summary.verdict.against == "champion":
        say(summary.answer)  # else the verdict has told it
    for note in summary.notes:
        say(f"note: {note}")
    say(f"report: {report_path.resolve()}")


def show_verdict(summary: EvaluationSummary) -> None:
    """Print what the gate decided, with its reasons; nothing where nothing was compared."""
    verdict = summary.verdict
    if verdict is None:
        return
    first, *others = verdict.reasons
    say(f"verdict: {verdict.decision.upper()}. {first}")
    for reason in others if verdict.decision != "promote" else ():
        say(f"  {reason}")
    for note in verdict.notes:
        say(f"  note: {note}")


def end_with_verdict(summary: EvaluationSummary) -> None:
    """End the command with 3 for reject, 4 for inconclusive, 5 where there is no verdict; go on after promote."""
    codes = {"promote": 0, "reject": 3, "inconclusive": 4}
    code = 5 if summary.verdict is None else codes[summary.verdict.decision]
    if code:
        sys.exit(code)
