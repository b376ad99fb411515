"""`tuneproof report`: report and spreadsheet of a run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.console import say
from flows.cli.options import NO_COMMON, ConfigPath, OpenReport, Settings
from flows.cli.starting import prepare

if TYPE_CHECKING:
    from tasks.core.config import Config


def report(
    run: str, config: ConfigPath = None, /, *, open_report: OpenReport = False, settings: Settings = None
) -> None:
    """Write the report and the spreadsheet of a run again from its scores."""
    rewrite_report(run, prepare(config, NO_COMMON, settings), open_report=open_report)


def rewrite_report(run: str, config: Config, *, open_report: bool) -> None:
    """Write report and spreadsheet from the scores that are there, and tell where."""
    from tasks.core.evaluation.opponents.remote_runs import send_results, store_of
    from tasks.core.evaluation.opponents.run_lookup import find_and_bring
    from tasks.core.report.writing import report_run

    files = report_run(find_and_bring(run, config.pipeline.runs_dir))
    send_results(store_of(run, config.pipeline.runs_dir), files.directory)
    say(f"report: {files.report_path.resolve()}")
    say(f"spreadsheet: {files.spreadsheet_path.resolve()}")
    if open_report:
        open_in_browser(files.report_path)


def open_in_browser(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        say("No browser could be started here; open the file yourself.")
