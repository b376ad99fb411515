"""`tuneproof report`: report and spreadsheet of a run, written again."""

from __future__ import annotations

from pathlib import Path

from flows.cli.console import say
from flows.cli.options import NO_COMMON, ConfigPath, OpenReport, Settings
from flows.cli.starting import prepare


def report(
    run: str, config: ConfigPath = None, /, *, open_report: OpenReport = False, settings: Settings = None
) -> None:
    """Write the report and the spreadsheet of a run again from its scores."""
    runs_dir = prepare(config, NO_COMMON, settings).pipeline.runs_dir
    from tasks.core.evaluation.opponents.remote_runs import send_results, store_of
    from tasks.core.evaluation.opponents.run_lookup import find_and_bring
    from tasks.core.report.writing import report_run

    files = report_run(find_and_bring(run, runs_dir))
    send_results(store_of(run, runs_dir), files.directory)
    say(f"report: {files.report_path.resolve()}")
    say(f"spreadsheet: {files.spreadsheet_path.resolve()}")
    if open_report:
        open_in_browser(files.report_path)


def open_in_browser(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        say("No browser could be started here; open the file yourself.")
