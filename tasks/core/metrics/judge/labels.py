"""Rows that a person has labelled, for the calibration of a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tasks.core.errors import DataError
from tasks.core.metrics.catalogue import available
from tasks.core.metrics.judge.judged import Judged

_PREFERRED = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row: `label` is the metric's value (0 to 1) by a person; `other` is the second of two answers."""

    line: int
    metric: str
    question: str
    answer: str
    reference: str | None
    label: float
    other: str | None = None


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The rows of each metric, and the digest of the file. `rated`: the metrics with ratings, and the highest one."""

    rows: Mapping[str, tuple[LabelledRow, ...]]
    sha256: str
    rated: Mapping[str, int]


def read_labels(path: Path, metric: str | None) -> LabelFile:
    """Read JSON lines with question, predicted_answer, ground_truth and label; or answer_a and answer_b of two answers.

    `metric` is that of rows that name none. Labels are values from 0 to 1, true or false, ratings where the metric
    has them (and the highest one occurs), and "a", "b" or "tie" of two answers. Raises DataError with the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "name a file of labelled rows") from error
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            row = _object(line, f"{path}, line {number}")
            found.setdefault(_metric_of(row, metric, f"{path}, line {number}"), []).append((number, row))
    if not found:
        raise DataError(f"{path} holds no rows", "put one JSON object on each line; see docs/judge.md")
    judged = judged_metrics()
    rated = {
        name: top
        for name, rows in found.items()
        if (top := judged[name].top_rating) is not None and any(row.get("label") == top for _, row in rows)
    }
    labelled = {
        name: tuple(_labelled(row, number, name, path, rated.get(name)) for number, row in rows)
        for name, rows in found.items()
    }
    return LabelFile(labelled, hashlib.sha256(content).hexdigest(), rated)


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON", "put one JSON object on each line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is no JSON object", "put one JSON object on each line")
    return row


def judged_metrics() -> dict[str, Judged]:
    """All metrics that a judge scores, by name."""
    return {family.name: family.judged for family in available() if family.judged is not None}


def _metric_of(row: Mapping[str, Any], metric: str | None, place: str) -> str:
    name, judged = row.get("metric", metric), judged_metrics()
    if name is None and "answer_a" in row:
        name = next(name for name, metric in judged.items() if metric.of_two_answers)
    if not isinstance(name, str) or name not in judged:
        listed = ", ".join(judged)
        told = "names no metric" if name is None else f"names the metric {name!r}, which no judge scores"
        raise DataError(f"{place} {told}", f'give --metric or "metric" in the row, one of {listed}')
    return name


def _labelled(
    row: Mapping[str, Any], number: int, metric: str, path: Path, top_rating: int | None
) -> LabelledRow:
    place, judged = f"{path}, line {number}", judged_metrics()[metric]
    answer = _text(row, "answer_a" if judged.of_two_answers else "predicted_answer", place)
    other = _text(row, "answer_b", place) if judged.of_two_answers else None
    reference = row.get("ground_truth")
    if judged.labels_need_reference or reference is not None:
        reference = _text(row, "ground_truth", place)
    label = _preferred(row, place) if judged.of_two_answers else _value(row, place, top_rating)
    return LabelledRow(number, metric, _text(row, "question", place), answer, reference, label, other)


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    text = row.get(name)
    if not isinstance(text, str):
        raise DataError(f"{place} has no text in {name!r} but {text!r:.80}", f"give it the text {name!r}")
    return text


def _preferred(row: Mapping[str, Any], place: str) -> float:
    label = row.get("label")
    if not isinstance(label, str) or label.lower() not in _PREFERRED:
        raise DataError(f"{place} has the label {label!r:.80}", 'write "a", "b" or "tie"')
    return _PREFERRED[label.lower()]


def _value(row: Mapping[str, Any], place: str, top_rating: int | None) -> float:
    label = row.get("label")
    if isinstance(label, bool) and top_rating is None:
        return float(label)
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if top_rating is not None:
        ratings = range(top_rating + 1)
        if not is_number or label not in ratings:
            *others, top = map(str, ratings)
            raise DataError(
                f"{place} has the label {label!r:.80}, while others of the file are ratings up to {top}",
                f"write ratings {', '.join(others)} and {top}, or values from 0 to 1, and not both in one file",
            )
        return float(label) / top_rating  # type: ignore[arg-type]
    if not is_number or not 0 <= label <= 1:  # type: ignore[operator]
        raise DataError(f"{place} has the label {label!r:.80}", "write a value from 0 to 1, or true or false")
    return float(label)  # type: ignore[arg-type]
