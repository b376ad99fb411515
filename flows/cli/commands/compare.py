"""`tuneproof compare`: two runs on the rows that both answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.commands.evaluate import show_finding
from flows.cli.commands.report import open_in_browser
from flows.cli.console import show_table
from flows.cli.options import NO_COMMON, ConfigPath, OpenReport, Settings
from flows.cli.starting import prepare
from tasks.core.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from tasks.core.config import Config
    from tasks.core.evaluation.summary import EvaluationSummary


def compare(
    run_a: str,
    run_b: str,
    config: ConfigPath = None,
    /,
    *,
    out: Annotated[
        Path | None,
        Parameter(help="Folder for the report; compared-with-RUN_A in that of RUN_B if not given."),
    ] = None,
    open_report: OpenReport = False,
    settings: Settings = None,
) -> None:
    """Compare two runs on the rows that both answered; RUN_A is before, RUN_B after.

    Generates no answers; a model is used only where a metric of the settings needs one.
    """
    loaded = prepare(config, NO_COMMON, settings)
    if out is not None and out.is_file():
        raise ConfigError(f"--out {out} is a file", "name a folder; it is made when it is not there")
    compare_named(run_a, run_b, loaded, directory=out, open_report=open_report)


def compare_named(
    run_a: str, run_b: str, config: Config, *, directory: Path | None, open_report: bool
) -> None:
    """Compare two runs, print the scores of both with the change, and where the report is."""
    from tasks.core.evaluation.evaluate import require_verdicts
    from tasks.core.evaluation.opponents.run_lookup import find_and_bring, training_manifest
    from tasks.core.metrics.models.scoring_models import ScoringModels
    from tasks.core.report.writing import compare_runs

    runs_dir = config.pipeline.runs_dir
    before, after = find_and_bring(run_a, runs_dir), find_and_bring(run_b, runs_dir)
    summary, files = compare_runs(
        before,
        after,
        config.evaluator,
        directory=directory,
        model_manifest=training_manifest(after),
        models=ScoringModels(config.evaluator, api_key=_judge_key(config)),
    )
    _show_comparison(summary)
    show_finding(summary, files.report_path)
    require_verdicts(summary, files.report_path)
    if open_report:
        open_in_browser(files.report_path)


def _judge_key(config: Config) -> SecretStr | None:
    """The judge's key where a Secret block keeps it; Prefect is loaded only then."""
    if not config.evaluator.judge_api_key.startswith("secret:"):
        return None
    from tasks.server.secret_blocks import judge_key_of

    return judge_key_of(config.evaluator)


def _show_comparison(summary: EvaluationSummary) -> None:
    from tasks.core.evaluation.wording import percent, shown_change, shown_metric

    comparison, baseline = summary.comparison, summary.baseline
    if comparison is None or baseline is None:
        return
    rows = []
    for metric in summary.candidate.metrics:
        change = comparison.metric(metric.name)
        if change is None:
            continue
        better = {"candidate": "better", "baseline": "worse", "undecided": ""}[change.better]
        told = shown_change(change, metric) or "not scored"
        tally = "" if change.wins is None else f"{change.wins} / {change.ties} / {change.losses}"
        before, after = shown_metric(baseline.metric(metric.name)), shown_metric(metric)
        rows.append((metric.name, before, after, told, better, tally))
    title = (
        f"{summary.candidate.run_name} against {baseline.run_name}: "
        f"{comparison.paired_rows:,} shared rows, {percent(summary.settings.confidence)} intervals"
    )
    columns = ("metric", "before", "after", "change", "", "better / equal / worse")
    show_table(title, columns, rows)
