"""From predictions to a table of scores: one value per row and metric, and what corpus figures need."""

from __future__ import annotations

import hashlib
import multiprocessing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.core.children import end_with_parent
from tasks.core.errors import EvaluationError
from tasks.core.interruption import unheard_by_children
from tasks.core.metrics.catalogue import reported
from tasks.core.metrics.metric import (
    ERROR_ROW,
    MEAN,
    BatchScores,
    ErrorPolicy,
    FloatArray,
    Metric,
    MetricFamily,
)
from tasks.core.records import Prediction

BATCH_ROWS = 1000
_WITHOUT_WIDTH = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Scores of one run, in the order of its rows (n).

    `values[metric]`: shape (n,), NaN where unscored. `statistics[metric]`: shape (n, width), zeros
    where unscored. `reasons[metric][i]` says why. `questions` (all that was asked) and `references`: hashes; equal =
    same text, blanks and Unicode form aside. `empty`: no answer, though no error; `characters`: its length.
    """

    ids: tuple[str, ...]
    metrics: tuple[Metric, ...]
    values: dict[str, FloatArray]
    statistics: dict[str, FloatArray]
    reasons: dict[str, list[str | None]]
    questions: NDArray[np.uint64]
    references: NDArray[np.uint64]
    errors: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    empty: NDArray[np.bool_]
    characters: NDArray[np.int64]
    cut_in_thoughts: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))

    @property
    def row_count(self) -> int:
        """Rows, scored or not."""
        return len(self.ids)

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)


def score_predictions(
    predictions: Iterable[Prediction],
    families: Sequence[MetricFamily],
    *,
    error_rows: ErrorPolicy = "wrong",
    processes: int = 1,
) -> ScoreTable:
    """Score every prediction by every family; predictions are read in batches and not kept.

    `error_rows`: "wrong" gives them each metric's worst value, "excluded" leaves them unscored.
    With `processes` > 1, that many others score (started with spawn).
    Raises EvaluationError when there are no rows or an id occurs twice.
    """
    columns = _Columns(families, error_rows)
    for rows, scores in _scored_batches(predictions, families, processes):
        columns.add(rows, scores)
    return columns.table()


def _scored_batches(
    predictions: Iterable[Prediction], families: Sequence[MetricFamily], processes: int
) -> Iterator[tuple[Sequence[Prediction], list[BatchScores]]]:
    batches = batched(map(_without_text_of_errors, predictions), BATCH_ROWS)
    if processes <= 1:
        for rows in batches:
            yield rows, [family.score(rows) for family in families]
        return
    with ExitStack() as stack:
        pool = stack.enter_context(
            # A killed parent leaves its pool waiting for work for ever.
            ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=end_with_parent)
        )
        for group in batched(batches, 2 * processes):
            with unheard_by_children():  # the pool begins its processes when it gets work
                futures = [
                    [None if family.in_process else pool.submit(family.score, rows) for family in families]
                    for rows in group
                ]
            for rows, row_futures in zip(group, futures, strict=True):
                yield (
                    rows,
                    [
                        family.score(rows) if future is None else future.result()
                        for family, future in zip(families, row_futures, strict=True)
                    ],
                )


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


def _without_text_of_errors(row: Prediction) -> Prediction:
    if row.error is not None and row.predicted_answer:
        return row.model_copy(update={"predicted_answer": ""})
    return row


class _Columns:
    """Collects batches of scores and applies the policy for error rows."""

    def __init__(self, families: Sequence[MetricFamily], error_rows: ErrorPolicy) -> None:
        self._families = families
        self._error_rows = error_rows
        self._metrics = reported(families)
        self._ids: list[str] = []
        self._facts: dict[str, list[NDArray[Any]]] = {name: [] for name in _FACTS}
        self._values: dict[str, list[FloatArray]] = {metric.name: [] for metric in self._metrics}
        self._statistics: dict[str, list[FloatArray]] = {metric.name: [] for metric in self._metrics}
        self._reasons: dict[str, list[str | None]] = {metric.name: [] for metric in self._metrics}

    def add(self, rows: Sequence[Prediction], batches: Sequence[BatchScores]) -> None:
        errors = np.array([row.error is not None for row in rows])
        self._ids.extend(row.id for row in rows)
        for name, (kind, fact) in _FACTS.items():  # numbers of Python would take five times the memory
            self._facts[name].append(np.array([fact(row) for row in rows], dtype=kind))
        for family, scores in zip(self._families, batches, strict=True):
            for metric in family.metrics:
                self._add_metric(metric, scores, errors)

    def _add_metric(self, metric: Metric, scores: BatchScores, errors: NDArray[np.bool_]) -> None:
        values, reasons = scores.values[metric.name].copy(), list(scores.reasons)
        scored = np.array([reason is None for reason in reasons])
        wrong = errors & scored & metric.about_the_answer
        # Where values have no end, no value is the worst; such a row has none.
        if self._error_rows == "wrong" and metric.errors_are_wrong and np.isfinite(metric.worst):
            values[wrong] = metric.worst
        else:
            values[wrong] = np.nan
            reasons = [ERROR_ROW if wrong[i] else reason for i, reason in enumerate(reasons)]
        scored = ~np.isnan(values)
        if metric.corpus is MEAN:
            statistics = np.stack([np.where(scored, values, 0.0), scored.astype(float)], axis=1)
        else:
            statistics = np.where(scored[:, None], scores.statistics[metric.name], 0.0)
        self._values[metric.name].append(values)
        self._statistics[metric.name].append(statistics)
        self._reasons[metric.name].extend(reasons)

    def table(self) -> ScoreTable:
        if not self._ids:
            raise EvaluationError("there are no predictions to score", "run `tuneproof infer` first")
        identifier, count = Counter(self._ids).most_common(1)[0]
        if count > 1:
            raise EvaluationError(
                f"the row id {identifier!r} occurs {count} times in the predictions",
                "one file must hold the answers of one run; was something appended to it?",
            )
        return ScoreTable(
            ids=tuple(self._ids),
            metrics=self._metrics,
            values={name: np.concatenate(parts) for name, parts in self._values.items()},
            statistics={name: np.concatenate(parts) for name, parts in self._statistics.items()},
            reasons=self._reasons,
            **{name: np.concatenate(parts) for name, parts in self._facts.items()},
        )


def _asked(row: Prediction) -> str:
    """All that the model was told; rows with the same text ask the same question."""
    turns = (f"{turn.role}\x01{turn.content}" for turn in row.earlier_turns)
    return "\x00".join((row.system_prompt or "", *turns, row.question))


def _hash(text: str) -> int:
    """64 bits of the text's content: Unicode form, blanks and characters without width do not count."""
    content = " ".join(unicodedata.normalize("NFKC", text).translate(_WITHOUT_WIDTH).split())
    return int.from_bytes(hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=8).digest())


# What a table tells of each row besides its scores: the kind of number, and how it is found.
_FACTS: dict[str, tuple[type, Callable[[Prediction], Any]]] = {
    "questions": (np.uint64, lambda row: _hash(_asked(row))),
    "references": (np.uint64, lambda row: _hash("\0".join(row.references))),
    "errors": (bool, lambda row: row.error is not None),
    "truncated": (bool, lambda row: row.metadata.finish_reason == "length"),
    "empty": (bool, lambda row: row.error is None and not row.predicted_answer.strip()),
    "characters": (np.int64, lambda row: len(row.predicted_answer)),
    "cut_in_thoughts": (bool, lambda row: row.metadata.is_cut_in_thoughts),
}
