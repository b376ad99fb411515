"""`report.html`: one file that opens without a network and answers "is it better?" first."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.evaluation.wording import count_checks, setting_rows
from tasks.core.files import replacing
from tasks.core.report.html_page import json_for_html, render_page
from tasks.core.report.report_data import LONGEST_TEXT, Distributions, pack_rows, select_rows
from tasks.core.report.row_view import RowView

_SCRIPTS = (
    "d3.min.js",
    "plot.min.js",
    "table-core.min.js",
    "diff.min.js",
    "theme.js",
    "report_charts.js",
    "report_rows.js",
)


def write_report(path: Path, summary: EvaluationSummary, rows: Iterable[RowView]) -> None:
    """Render and write the report, whole or not at all. Raises StorageError when it cannot be written."""
    html = render(summary, rows)
    with replacing(path) as partial_path:
        partial_path.write_text(html, encoding="utf-8")


def render(summary: EvaluationSummary, rows: Iterable[RowView]) -> str:
    """The report as HTML. Rows are read once; texts of rows never become markup."""
    distributions = Distributions(summary)
    embedded, row_count = select_rows(distributions.watch(rows), summary.leading_metric.name)
    overview = {
        "metrics": distributions.charts(),
        "leading": summary.leading_metric.name,
        "losses": [point.model_dump() for point in summary.training.losses] if summary.training else [],
        "hasBaseline": summary.baseline is not None,
    }
    opponents = [
        (kind, title, run, comparison)
        for kind, title, run, comparison in (
            ("baseline", "Before", summary.baseline, summary.comparison),
            ("champion", "Champion", summary.champion, summary.champion_comparison),
        )
        if run is not None
    ]
    page = partial(
        render_page,
        "report.html.j2",
        _SCRIPTS,
        summary=summary,
        candidate=summary.candidate,
        baseline=summary.baseline,
        comparison=summary.comparison,
        opponents=opponents,
        verdict=summary.verdict,
        checks_told=count_checks(summary.verdict.checks) if summary.verdict else "",
        overview=json_for_html(overview),
        embedded_count=len(embedded),
        row_count=row_count,
        settings=list(setting_rows(summary)),
    )
    without_rows = page(packed_rows="", text_limit=LONGEST_TEXT // 2)
    packed, text_limit = pack_rows(embedded, len(without_rows.encode()))
    return page(packed_rows=packed, text_limit=text_limit)
