"""`leaderboard.html`: all runs as tables to sort and filter, one table for each set of rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tasks.core.evaluation.summary import MetricSummary
from tasks.core.evaluation.wording import is_share, label
from tasks.core.files import replacing
from tasks.core.provenance import now
from tasks.core.report.html_page import json_for_html, render_page
from tasks.core.report.leaderboard import Leaderboard, RankedRun, RunGroup

_SCRIPTS = ("table-core.min.js", "theme.js", "leaderboard.js")


def write_leaderboard(path: Path, board: Leaderboard, *, runs_dir: Path) -> None:
    """Render and write the page, whole or not at all; its links to reports are relative to its folder.

    Raises StorageError when it cannot be written.
    """
    html = render_page(
        "leaderboard.html.j2",
        _SCRIPTS,
        runs_dir=str(runs_dir),
        run_count=sum(len(group.runs) for group in board.groups),
        groups=board.groups,
        unfinished=board.unfinished,
        written_at=now("minutes"),
        data=json_for_html([_group(group, path.parent) for group in board.groups]),
    )
    with replacing(path) as partial_path:
        partial_path.write_text(html, encoding="utf-8")


def _group(group: RunGroup, directory: Path) -> dict[str, Any]:
    return {
        "metrics": [
            {
                "name": metric.name,
                "label": label(metric.name),
                "description": metric.description,
                "direction": metric.direction,
                "share": is_share(metric.minimum, metric.maximum),
            }
            for metric in group.metrics
        ],
        "runs": [_run(run, directory) for run in group.runs],
    }


def _run(run: RankedRun, directory: Path) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "name": run.path.name,
        "href": None if run.report_path is None else quote(os.path.relpath(run.report_path, directory)),
        "model": run.model_name,
        "modelId": manifest.identity.model.model_id,
        "promoted": run.promoted,
        "settings": [f"{name} {value}" for name, value in run.settings],
        "errors": manifest.error_count,
        "verdict": run.decision,
        "speed": run.tokens_per_second,
        "memory": manifest.peak_memory_bytes,
        "finished": manifest.finished_at,
        "scores": {metric.name: _figures(metric) for metric in run.scores.metrics} if run.scores else {},
    }


def _figures(metric: MetricSummary) -> list[float | None]:
    """Value, lower and upper end."""
    interval = metric.interval
    return [metric.value, interval.low if interval else None, interval.high if interval else None]
