"""Writes docs/metrics.md from the metrics themselves: `python docs/generate_metrics.py`."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from tasks.core.metrics.catalogue import available
from tasks.core.metrics.metric import Metric, MetricFamily

PAGE_PATH = Path(__file__).with_name("metrics.md")

INTRODUCTION = """\
<!-- Written by docs/generate_metrics.py from tasks/core/metrics; do not edit by hand. -->
# Metrics

Name metrics in `evaluator.metrics`. Each has one value a row and one figure for the run. A row that a metric cannot
judge is *unscored*: it is counted with its reason and is in no average. A row without an answer because of an error
counts as the metric's worst value (`error_rows = "excluded"` leaves it out), except where the table says so.
[Read the outputs](read-the-outputs.md) says more about the figures, their intervals and comparisons.

`regex_match:PATTERN` looks for one pattern in all answers; `module:function` is a
[metric of your own](read-the-outputs.md#the-figures).
"""

JUDGES = "[Let a model judge](judge.md) is about endpoint, key, cost and cache of the judge.\n"


def render() -> str:
    """Give the whole page."""
    header = (
        "| name | reports | what it is | range | better | figure for the run | unscored when | needs | source |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = [_row(family, metric) for family in available() for metric in family.metrics]
    notes = [_note(family.name, family.note) for family in available() if family.note is not None]
    return "\n".join([INTRODUCTION, header, *rows, "", "## Notes\n", *notes, "", JUDGES])


def _note(name: str, note: str) -> str:
    return textwrap.fill(
        f"- **{name}** {note}",
        width=120,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(family: MetricFamily, metric: Metric) -> str:
    high = "no limit" if math.isinf(metric.maximum) else f"{metric.maximum:g}"
    values = "0 or 1" if metric.kind == "binary" else f"{metric.minimum:g} to {high}"
    cells = (
        f"`{family.name}`",
        f"`{metric.name}`",
        metric.description,
        values,
        "neither" if metric.direction == "none" else metric.direction,
        metric.corpus.name,
        metric.unscored_when,
        family.needs,
        metric.source,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE_PATH.write_text(render(), encoding="utf-8")
