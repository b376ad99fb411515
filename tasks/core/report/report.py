"""`report.html`: one file that opens without a network and answers "is it better?" first.

The rows that it embeds, and the histograms, are made here too.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.evaluation.wording import count_checks, is_share, label, setting_rows
from tasks.core.files import replacing
from tasks.core.metrics.metric import FloatArray
from tasks.core.report.html_page import json_for_html, render_page
from tasks.core.report.row_view import Answer, RowView

EMBEDDED_ROWS = 10_000
LONGEST_TEXT = 20_000
SHORTEST_TEXT = 100
FILE_BYTES = 4_950_000  # 5 MB, and a little room
_FILE_BYTES_PER_ROW = 4_700
_BINS = 20
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
    page = partial(
        render_page,
        "report.html.j2",
        _SCRIPTS,
        summary=summary,
        candidate=summary.candidate,
        baseline=summary.baseline,
        comparison=summary.comparison,
        opponents=summary.opponents,
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


# --- rows and charts


def select_rows(rows: Iterable[RowView], metric: str) -> tuple[list[dict[str, Any]], int]:
    """Compact rows to embed, and how many rows there are.

    Beyond 10,000 rows, those are kept whose score by `metric` changed most, those with errors, then the first.
    """
    kept: list[tuple[float, int, dict[str, Any]]] = []
    count = 0
    for number, row in enumerate(rows):
        kept.append((_interest(row, metric), number, compact(row, number)))
        count += 1
        if len(kept) >= 2 * EMBEDDED_ROWS:
            kept = _most_interesting(kept)
    return [row for _, _, row in sorted(_most_interesting(kept), key=lambda item: item[1])], count


def _most_interesting(
    rows: list[tuple[float, int, dict[str, Any]]],
) -> list[tuple[float, int, dict[str, Any]]]:
    return sorted(rows, key=lambda item: (-item[0], item[1]))[:EMBEDDED_ROWS]


def _interest(row: RowView, metric: str) -> float:
    if row.candidate.error or (row.baseline and row.baseline.error):
        return float("inf")
    baseline = (row.scores.baseline_scores or {}).get(metric)
    score = row.scores.scores.get(metric)
    return 0.0 if score is None or baseline is None else abs(score - baseline)


def compact(row: RowView, number: int) -> dict[str, Any]:
    """One row with short keys: n number, q question, s system prompt, r reference, c/b answers, v/w scores.

    Of an answer: t text, e error, k tokens, h thoughts, i tokens of the thoughts, lost: cut in its thoughts.
    """
    return {
        "id": row.id,
        "n": number + 1,
        "q": row.question,
        "s": row.system_prompt,
        "r": row.reference,
        "c": _answer(row.candidate),
        "b": _answer(row.baseline) if row.baseline else None,
        "v": row.scores.scores,
        "w": row.scores.baseline_scores or {},
        "u": row.scores.unscored,
        "x": row.scores.baseline_unscored or {},
    }


def _answer(answer: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {"t": answer.text, "e": answer.error, "cut": answer.cut, "k": answer.tokens}
    if answer.reasoning is not None or answer.cut_in_thoughts:
        told |= {"h": answer.reasoning, "i": answer.reasoning_tokens, "lost": answer.cut_in_thoughts}
    return told


def pack_rows(rows: Sequence[dict[str, Any]], other_bytes: int) -> tuple[str, int]:
    """Rows as base64 of gzipped JSON, and the number of characters after which texts were cut.

    Texts are cut at 20,000 characters, and shorter where the file, of which `other_bytes` are taken, would
    grow beyond its size: 5 MB, or more for more than 1,000 rows.
    """
    limit = LONGEST_TEXT
    file_bytes = max(FILE_BYTES, _FILE_BYTES_PER_ROW * len(rows))
    budget = (file_bytes - other_bytes) * 3 // 4  # base64 makes four characters of three bytes
    while True:
        content = orjson.dumps([_cut(row, limit) for row in rows])
        packed = gzip.compress(content, compresslevel=6, mtime=0)  # 9 takes twice as long for a hundredth
        if len(packed) <= budget or limit <= SHORTEST_TEXT:
            return base64.b64encode(packed).decode("ascii"), limit
        limit = max(SHORTEST_TEXT, limit // 2)


def _cut(row: dict[str, Any], limit: int) -> dict[str, Any]:
    cut = {**row, **{key: _shorten(row[key], limit) for key in ("q", "s", "r")}}
    for key in ("c", "b"):
        if row[key] is not None:
            texts = {name: _shorten(row[key].get(name), limit) for name in ("t", "e", "h")}
            cut[key] = {**row[key], **{name: text for name, text in texts.items() if name in row[key]}}
    return cut


def _shorten(text: str | None, limit: int) -> str | None:
    if text is None or len(text) <= limit:
        return text
    return f"{text[:limit]} […] [{len(text) - limit:,} more characters]"


def histogram(values: FloatArray, minimum: float, maximum: float) -> list[int]:
    """Counts of finite values in 20 equal bins over [minimum, maximum]."""
    counts, _ = np.histogram(values[np.isfinite(values)], bins=_BINS, range=(minimum, maximum))
    return [int(count) for count in counts]


class Distributions:
    """Collects row scores while rows stream by, and gives histograms of all of them."""

    def __init__(self, summary: EvaluationSummary) -> None:
        self._metrics = summary.candidate.metrics
        self._scores: dict[str, list[tuple[float, float]]] = {metric.name: [] for metric in self._metrics}

    def watch(self, rows: Iterable[RowView]) -> Iterable[RowView]:
        """Pass rows on, remembering their scores."""
        missing = float("nan")
        for row in rows:
            other = row.scores.baseline_scores or {}
            for name, pairs in self._scores.items():
                pairs.append((row.scores.scores.get(name, missing), other.get(name, missing)))
            yield row

    def charts(self) -> list[dict[str, Any]]:
        """Per metric: range, direction, histograms of both runs and of the change per row."""
        return [
            self._chart(metric.name, metric.kind, metric.direction, metric.minimum, metric.maximum)
            for metric in self._metrics
        ]

    def _chart(
        self, name: str, kind: str, direction: str, minimum: float, maximum: float | None
    ) -> dict[str, Any]:
        pairs: FloatArray = np.array(self._scores[name], dtype=np.float64).reshape(-1, 2)
        candidate, baseline = pairs[:, 0], pairs[:, 1]
        finite = pairs[np.isfinite(pairs)]
        high = maximum if maximum is not None else float(finite.max(initial=minimum + 1))
        change = candidate - baseline
        reach = float(np.abs(change[np.isfinite(change)]).max(initial=0.0)) or 1.0
        reach = high - minimum if maximum is not None else reach
        return {
            "name": name,
            "label": label(name),
            "kind": kind,
            "direction": direction,
            "share": is_share(minimum, maximum),
            "range": [minimum, high],
            "candidate": histogram(candidate, minimum, high),
            "baseline": histogram(baseline, minimum, high) if np.isfinite(baseline).any() else None,
            "reach": reach,
            "change": histogram(change, -reach, reach),
            "outcomes": _outcomes(candidate, baseline) if kind == "binary" else None,
        }


def _outcomes(candidate: FloatArray, baseline: FloatArray) -> dict[str, int]:
    """For 0/1 metrics: how many rows each of the four ways."""
    return {
        "both": int(np.sum((candidate == 1) & (baseline == 1))),
        "gained": int(np.sum((candidate == 1) & (baseline == 0))),
        "lost": int(np.sum((candidate == 0) & (baseline == 1))),
        "neither": int(np.sum((candidate == 0) & (baseline == 0))),
    }
