"""`tuneproof runs`: the runs that are there, in a table and as a page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.console import say, show_table, told_time
from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import prepare
from tasks.core.errors import ConfigError
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.report.leaderboard import Leaderboard, RunGroup

_LISTED_METRICS = 3


def runs(
    config: ConfigPath = None,
    /,
    *,
    html: Annotated[
        list[Path] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Write a page to sort and filter too; without PATH to leaderboard.html beside the runs.",
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """List the runs that are there, finished or not, best first among those over the same rows."""
    loaded = prepare(config, NO_COMMON, settings)
    if html is not None and len(html) > 1:
        raise ConfigError(
            f"--html was given {len(html)} paths", "give one, or none for leaderboard.html beside the runs"
        )
    board = list_runs(loaded)
    if html is not None:
        write_leaderboard_page(loaded, board, html[0] if html else None)


def list_runs(config: Config) -> Leaderboard:
    """Print the runs: one table for each set of rows, best first by its first metric; then the unfinished.

    Returns what was read of them.
    """
    from tasks.core.evaluation.opponents.remote_runs import bring_overview
    from tasks.core.report.leaderboard import read_leaderboard

    runs = Store(config.pipeline.runs_dir)
    there = bring_overview(runs)
    runs_dir = runs.place
    board = read_leaderboard(runs.local, Store(config.pipeline.models_dir), there)
    if not board.groups and not board.unfinished:
        say(f"No runs in {runs_dir}; `tuneproof infer` makes one.")
    total = sum(len(group.runs) for group in board.groups)
    for group in board.groups:
        _show_group(group, total)
    if board.unfinished:
        show_table(f"Not finished in {runs_dir}", ("run", "state"), board.unfinished)
    return board


def _show_group(group: RunGroup, total: int) -> None:
    from tasks.core.evaluation.wording import shown_metric

    metrics = [metric.name for metric in group.metrics[:_LISTED_METRICS]]
    columns = ("run", "model", *metrics, "verdict", "tokens/s", "finished")
    rows = [
        (
            run.path.name,
            run.model_name + (" (promoted)" if run.promoted else ""),
            *("" if run.scores is None else shown_metric(run.scores.metric(name)) for name in metrics),
            run.decision,
            "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            told_time(datetime.fromisoformat(run.manifest.finished_at)),
        )
        for run in group.runs
    ]
    errors = sum(run.manifest.error_count for run in group.runs)
    told = f", {errors} rows with an error" if errors else ""
    is_ranked = bool(group.metrics) and group.metrics[0].direction != "none"
    ranked = f"; best {metrics[0]} first" if is_ranked else "" if metrics else "; not evaluated"
    title = f"{group.dataset}: {group.rows:,} rows ({group.rows_sha256[:8]}){told}{ranked}"
    show_table(title, columns, rows, of_rows=total)


def write_leaderboard_page(config: Config, board: Leaderboard, path: Path | None) -> None:
    """Write the leaderboard as a page; a folder gets a file `leaderboard.html`."""
    from tasks.core.report.leaderboard_page import write_leaderboard

    runs_dir = Store(config.pipeline.runs_dir).local
    path = path or runs_dir
    path = path / "leaderboard.html" if path.is_dir() or path == runs_dir else path
    write_leaderboard(path, board, runs_dir=runs_dir)
    say(f"leaderboard: {path.resolve()}")
