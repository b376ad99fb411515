"""The files of an evaluation, beside the predictions they are about: names, writing, reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field, ValidationError

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.figures import rounded
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.files import replacing, write_atomically
from tasks.core.own_digest import OWN_DIGEST, ForeignDigestError, with_own_digest, without_own_digest
from tasks.core.records import Record


@dataclass(frozen=True, slots=True)
class EvaluationFiles:
    """Where the results of one evaluation lie."""

    directory: Path

    @property
    def summary_path(self) -> Path:
        """All figures, settings and provenance."""
        return self.directory / "evaluator_output_summary.json"

    @property
    def scores_path(self) -> Path:
        """One object per row."""
        return self.directory / "scores.jsonl"

    @property
    def spreadsheet_path(self) -> Path:
        """The same for people with a spreadsheet."""
        return self.directory / "evaluator_output_detailed.xlsx"

    @property
    def report_path(self) -> Path:
        """One HTML file that opens without a network."""
        return self.directory / "report.html"


class RowScores(Record):
    """One line of `scores.jsonl`; a metric is in `scores` or, with the reason, in `unscored`."""

    id: str
    scores: dict[str, float]
    unscored: dict[str, str] = Field(default_factory=dict)
    baseline_scores: dict[str, float] | None = None
    baseline_unscored: dict[str, str] | None = None


def row_scores(candidate: ScoreTable, baseline: ScoreTable | None) -> Iterator[RowScores]:
    """Scores of each candidate row, with the baseline's of the same id where there is one."""
    position = {} if baseline is None else {identifier: i for i, identifier in enumerate(baseline.ids)}
    for i, identifier in enumerate(candidate.ids):
        scores, unscored = _row(candidate, i)
        row, partner = RowScores(id=identifier, scores=scores, unscored=unscored), position.get(identifier)
        if baseline is not None and partner is not None:
            theirs, why_not = _row(baseline, partner)
            row = row.model_copy(update={"baseline_scores": theirs, "baseline_unscored": why_not})
        yield row


def _row(table: ScoreTable, i: int) -> tuple[dict[str, float], dict[str, str]]:
    scores: dict[str, float] = {}
    unscored: dict[str, str] = {}
    for metric in table.metrics:
        value, reason = rounded(table.values[metric.name][i]), table.reasons[metric.name][i]
        if value is None:
            unscored[metric.name] = reason or "the metric gave no value"
        else:
            scores[metric.name] = value
    return scores, unscored


def write_scores(path: Path, rows: Iterable[RowScores]) -> str:
    """Write `scores.jsonl`, whole or not at all, and return its digest."""
    digest = hashlib.sha256()
    with replacing(path) as partial_path, partial_path.open("wb") as file:
        for row in rows:
            line = orjson.dumps(row.model_dump(exclude_none=True), option=orjson.OPT_APPEND_NEWLINE)
            file.write(line)
            digest.update(line)
    return digest.hexdigest()


def read_scores(path: Path) -> Iterator[RowScores]:
    """The rows of `scores.jsonl`. Raises EvaluationError when it is missing or damaged."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield RowScores.model_validate_json(line)
                except ValidationError as error:
                    raise EvaluationError(
                        f"{path}: line {number} is damaged", "run `tuneproof evaluate` again"
                    ) from error
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} does not exist", "run `tuneproof evaluate` first") from error


def write_summary(path: Path, summary: EvaluationSummary) -> None:
    """Write `evaluator_output_summary.json`, whole or not at all, with the digest of its own content."""
    content = with_own_digest(summary.model_dump(mode="json"))
    write_atomically(path, orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n")


def read_summary(path: Path) -> EvaluationSummary:
    """The summary of an earlier evaluation. Raises EvaluationError when it is missing or damaged."""
    content = read_summary_content(path)
    return _validated(path, content)


def read_summary_content(path: Path) -> dict[str, Any]:
    """The same as it lies there, for those who need little of many: its digest is right, which tells that it is whole.

    Summaries of older versions have no digest; they are validated. Raises EvaluationError like `read_summary`.
    """
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} does not exist", "run `tuneproof evaluate` first") from error
    except orjson.JSONDecodeError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no object")
    if content.get(OWN_DIGEST) is None:
        _validated(path, content)
    try:
        return without_own_digest(content)
    except ForeignDigestError as error:
        raise _damaged(path, str(error)) from error


def _validated(path: Path, content: dict[str, Any]) -> EvaluationSummary:
    try:
        return EvaluationSummary.model_validate(content)
    except ValidationError as error:
        raise _damaged(path, f"{error.error_count()} problems") from error


def _damaged(path: Path, how: str) -> EvaluationError:
    return EvaluationError(f"{path} is damaged ({how})", "run `tuneproof evaluate` again")
