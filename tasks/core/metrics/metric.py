"""What a metric is: its range and direction, its per-row value and its figure for the whole set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.core.config.changes import ScoringModel
from tasks.core.errors import EvaluationError
from tasks.core.records import Prediction

if TYPE_CHECKING:
    from tasks.core.metrics.judge.judge import Judge
    from tasks.core.metrics.judge.judged import Judged
    from tasks.core.metrics.models.embedding import Embedder
    from tasks.core.metrics.models.token_matching import TokenMatcher

FloatArray = NDArray[np.float64]

Kind = Literal["binary", "continuous"]
Direction = Literal["higher", "lower", "none"]
ErrorPolicy = Literal["wrong", "excluded"]
WatchedRate = Literal["empty", "cut", "error"]
"""What the gate watches of any two runs, whatever is measured."""

NO_REFERENCE = "no reference"
NO_PARTNER = "there is no answer to compare with"
ERROR_ROW = "error row"


@dataclass(frozen=True, slots=True)
class Corpus:
    """How rows become one figure: a function of the *sum* of per-row statistics.

    Every figure here is such a function, so a bootstrap resample of it is one matrix product.
    `figure` maps an array of shape (..., width) of summed statistics to one of shape (...).
    """

    name: str
    width: int
    figure: Callable[[FloatArray], FloatArray]


def _mean_of_sums(sums: FloatArray) -> FloatArray:
    totals, counts = sums[..., 0], sums[..., 1]
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


MEAN = Corpus("mean of the rows", 2, _mean_of_sums)
"""Statistics of a row: its value and 1; both 0 where the row is unscored."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One reported figure: values of a row lie in [`minimum`, `maximum`]. All that is told of it is declared here.

    `label` is the name as people write it, by default the name with blanks. `why_zero` says why a figure of 0 may
    tell less than the mean of its rows. `watched_rate` is the rate that it shows, if the gate watches that anyway.
    """

    name: str
    description: str
    source: str
    kind: Kind = "continuous"
    direction: Direction = "higher"
    minimum: float = 0.0
    maximum: float = 1.0
    corpus: Corpus = MEAN
    unscored_when: str = NO_REFERENCE
    errors_are_wrong: bool = True
    about_the_answer: bool = True
    """False: rows with an error are scored like all others."""
    label: str | None = None
    why_zero: str | None = None
    watched_rate: WatchedRate | None = None

    @property
    def worst(self) -> float:
        """The value an error row gets when errors count as wrong."""
        return self.maximum if self.direction == "lower" else self.minimum

    @property
    def middle(self) -> float:
        """The value of a tie, of a metric that compares two answers."""
        return (self.minimum + self.maximum) / 2


@dataclass(frozen=True, slots=True)
class BatchScores:
    """Scores of n rows by one family: `values[metric]` has shape (n,), NaN where unscored.

    `reasons[i]` says why row i is unscored (None where it is scored).
    `statistics[metric]` has shape (n, width), only for metrics whose corpus figure is not the mean.
    """

    values: dict[str, FloatArray]
    reasons: list[str | None]
    statistics: dict[str, FloatArray] = field(default_factory=dict)


ScoreRows = Callable[[Sequence[Prediction]], BatchScores]
ScorePairs = Callable[[Sequence[tuple[Prediction, Prediction]]], BatchScores]
"""Scores the first answer of each pair beside the second one, of another run to the same row."""


class Sources(Protocol):
    """What metrics may need besides the rows; each is made when it is first asked for."""

    @property
    def judge(self) -> Judge:
        """The judge model. Raises EvaluationError when it cannot be used."""

    @property
    def embedder(self) -> Embedder:
        """The embedding model. Raises EvaluationError when it cannot be used."""

    @property
    def token_matcher(self) -> TokenMatcher:
        """The model of bert_score. Raises EvaluationError when it cannot be used."""


@dataclass(frozen=True, slots=True)
class ScoredRun:
    """The run whose rows are scored; `references_path` may not exist, and is None for a plain file of answers.

    `references_sha256` and `reference_tokens` are what the manifest tells of that file.
    """

    sources: Sources
    references_path: Path | None
    references_sha256: str | None = None
    reference_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """What a person asks for by name; it reports one metric or several computed together.

    `score` is only given rows without an error. It must be importable (no closure) unless
    `in_process` is true, because rows may be scored in other processes. A family that needs more than the
    rows has `bind`, which makes its `score` for one run; `models` are those that it asks then, whose settings are
    part of what its figures depend on. `needs` and `note` are its words in the documentation. `judged` tells of a
    family that a judge scores what its comparison with people needs. A family that compares two runs' answers has
    `pairs`, which makes what scores them; alone, a run is unscored by it. Its figures are means of rows, and the other
    run's value is the first one's on the other side of the range.
    """

    name: str
    metrics: tuple[Metric, ...]
    score: ScoreRows
    in_process: bool = False
    bind: Callable[[ScoredRun], ScoreRows] | None = None
    models: tuple[ScoringModel, ...] = ()
    needs: str = "nothing"
    note: str | None = None
    judged: Judged | None = None
    pairs: Callable[[Sources], ScorePairs] | None = None


@dataclass(frozen=True, slots=True)
class Pairwise:
    """Scores rows one by one with `function(answer, reference)`; rows without a reference are unscored.

    Of several right answers the one that gives the best value counts. The function gives None for a pair that it
    cannot judge; where it judges none of a row's, `undecided` says why.
    """

    metric: str
    function: Callable[[str, str], float | None]
    undecided: str = NO_REFERENCE

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        values = np.full(len(rows), np.nan)
        reasons: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row.ground_truth is None:
                reasons[i] = NO_REFERENCE
                continue
            found = (self.function(row.predicted_answer, reference) for reference in row.references)
            values[i] = max((value for value in found if value is not None), default=np.nan)
            if np.isnan(values[i]):
                reasons[i] = self.undecided
        return BatchScores({self.metric: values}, reasons)


def row_of_reference(rows: Sequence[Prediction]) -> NDArray[np.int64]:
    """For each reference of all rows, one row after another, the position of its row."""
    return np.repeat(np.arange(len(rows)), [len(row.references) for row in rows])


def single(metric: Metric, score: ScoreRows, **told: Any) -> MetricFamily:
    """The family of one metric, of the same name."""
    return MetricFamily(metric.name, (metric,), score, **told)


def compared(
    metric: Metric, function: Callable[[str, str], float | None], undecided: str = NO_REFERENCE
) -> MetricFamily:
    """The family of one metric that compares answer and reference row by row."""
    return single(metric, Pairwise(metric.name, function, undecided))


def asking(
    metric: Metric, scorer: Callable[[Sources], ScoreRows], *models: ScoringModel, **told: Any
) -> MetricFamily:
    """The family of one metric whose `scorer` asks models."""
    score = NeedsModels(metric.name)
    return single(metric, score, in_process=True, bind=lambda run: scorer(run.sources), models=models, **told)


def pairing(
    metric: Metric, scorer: Callable[[Sources], ScorePairs], *models: ScoringModel, **told: Any
) -> MetricFamily:
    """The family of one metric that compares the answers of two runs."""
    score = Unpaired(metric.name)
    return single(metric, score, in_process=True, pairs=scorer, models=models, **told)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """Leaves all rows unscored by a metric that compares two runs, until both are there."""

    metric: str

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        return BatchScores({self.metric: np.full(len(rows), np.nan)}, [NO_PARTNER] * len(rows))


@dataclass(frozen=True, slots=True)
class NeedsModels:
    """Stands in for a metric that was named without the models it needs."""

    name: str

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        raise EvaluationError(
            f"the metric {self.name!r} needs a model",
            "score through Evaluator, which has the settings for it",
        )
