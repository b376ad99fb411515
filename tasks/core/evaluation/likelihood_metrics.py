"""Perplexity of the references, from the likelihoods that the inference stage wrote; no model is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.metric import (
    BatchScores,
    Corpus,
    FloatArray,
    Metric,
    MetricFamily,
    ScoredRun,
    ScoreRows,
)
from tasks.core.records import Prediction

NO_LIKELIHOODS = "the run did not score its references"
NO_LIKELIHOOD = "its reference was not scored"


def _perplexity(sums: FloatArray) -> FloatArray:
    losses, tokens = sums[..., 0], sums[..., 1]
    means = np.divide(losses, tokens, out=np.full_like(losses, np.nan), where=tokens > 0)
    figure: FloatArray = np.exp(np.minimum(means, 700.0))  # beyond, a float cannot hold it
    return figure


CORPUS_PERPLEXITY = Corpus("perplexity per token of all references", 2, _perplexity)
"""Statistics of a row: its reference's negative log-likelihood (natural logarithm), and its tokens."""

PERPLEXITY = Metric(
    "perplexity",
    "How surprised the model is by the references, per token; compare only models with the same tokenizer.",
    "Jelinek et al. 1977",
    direction="lower",
    minimum=1.0,
    maximum=float("inf"),
    corpus=CORPUS_PERPLEXITY,
    unscored_when=f"{NO_LIKELIHOODS} (inferencer.score_references), or the row has none that fits or ended in an "
    "error",
    errors_are_wrong=False,
    about_the_answer=False,
)


@dataclass(frozen=True, slots=True)
class ReferenceLikelihoods:
    """Scores rows by id with (negative log-likelihood, tokens) or why there is none; None without a file."""

    by_id: dict[str, tuple[float, int] | str] | None

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        """Look the rows up; `reference_likelihoods.jsonl` has no line for a row without a reference."""
        statistics = np.zeros((len(rows), 2))
        reasons: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            found = None if self.by_id is None else self.by_id.get(row.id)
            if found is None:
                reasons[i] = NO_LIKELIHOODS if self.by_id is None else NO_LIKELIHOOD
            elif isinstance(found, str):
                reasons[i] = f"{NO_LIKELIHOOD}: {found}"
            else:
                statistics[i] = found
        return BatchScores({PERPLEXITY.name: _perplexity(statistics)}, reasons, {PERPLEXITY.name: statistics})


def read_likelihoods(path: Path | None) -> ReferenceLikelihoods:
    """Read a run's `reference_likelihoods.jsonl`. Raises EvaluationError when a line is damaged."""
    if path is None or not path.exists():
        return ReferenceLikelihoods(None)
    by_id: dict[str, tuple[float, int] | str] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = orjson.loads(line)
                error = row.get("error")
                scored = None if error else (float(row["negative_log_likelihood"]), int(row["tokens"]))
                by_id[row["id"]] = scored or str(error)
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise EvaluationError(
                    f"{path}: line {number} is damaged",
                    "delete the file and run `tuneproof infer` again; answers are not generated again",
                ) from exc
    return ReferenceLikelihoods(by_id)


def _bind(run: ScoredRun) -> ScoreRows:
    return read_likelihoods(run.references_path)


LIKELIHOOD_FAMILIES = (
    MetricFamily("perplexity", (PERPLEXITY,), ReferenceLikelihoods(None), in_process=True, bind=_bind),
)
