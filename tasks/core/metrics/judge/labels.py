"""Rows that a person has labelled, for the calibration of a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tasks.core.errors import DataError
from tasks.core.metrics.catalogue import available, family_of
from tasks.core.metrics.judge.judge_metrics import ANSWER_ACCURACY, PREFERENCE

_TOP_RATING = 2
_PREFERRED = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row: `label` is the metric's value (0 to 1) by a person; `other` is the second answer of a preference."""

    line: int
    metric: str
    question: str
    answer: str
    reference: str | None
    label: float
    other: str | None = None


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The rows of each metric, and the digest of the file. `rated` names metrics whose labels were 0, 1 and 2."""

    rows: Mapping[str, tuple[LabelledRow, ...]]
    sha256: str
    rated: frozenset[str]


def read_labels(path: Path, metric: str | None) -> LabelFile:
    """Read JSON lines with question, predicted_answer, ground_truth and label; for preference answer_a and answer_b.

    `metric` is that of rows that name none. Labels are values from 0 to 1, true or false, ratings 0, 1, 2 for
    answer_accuracy (where a 2 occurs), and "a", "b" or "tie" for preference. Raises DataError with the line.
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
    rated = frozenset(name for name, rows in found.items() if name == ANSWER_ACCURACY.name and _rates(rows))
    labelled = {
        name: tuple(_labelled(row, number, name, path, rated=name in rated) for number, row in rows)
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


def _metric_of(row: Mapping[str, Any], metric: str | None, place: str) -> str:
    name = row.get("metric", metric)
    if name is None and "answer_a" in row:
        name = PREFERENCE.name
    judged = [family.name for family in available() if family.asks is not None]
    if name not in judged:
        listed = ", ".join(judged)
        told = "names no metric" if name is None else f"names the metric {name!r}, which no judge scores"
        raise DataError(f"{place} {told}", f'give --metric or "metric" in the row, one of {listed}')
    return str(name)


def _rates(rows: list[tuple[int, dict[str, Any]]]) -> bool:
    return any(row.get("label") == _TOP_RATING for _, row in rows)


def _labelled(row: Mapping[str, Any], number: int, metric: str, path: Path, *, rated: bool) -> LabelledRow:
    place = f"{path}, line {number}"
    is_preference = metric == PREFERENCE.name
    answer = _text(row, "answer_a" if is_preference else "predicted_answer", place)
    other = _text(row, "answer_b", place) if is_preference else None
    family, reference = family_of(metric), row.get("ground_truth")
    if family is None or family.labels_need_reference or reference is not None:
        reference = _text(row, "ground_truth", place)
    label = _preferred(row, place) if is_preference else _value(row, place, rated=rated)
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


def _value(row: Mapping[str, Any], place: str, *, rated: bool) -> float:
    label = row.get("label")
    if isinstance(label, bool) and not rated:
        return float(label)
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if rated:
        if not is_number or label not in (0, 1, 2):
            raise DataError(
                f"{place} has the label {label!r:.80}, while others of the file are ratings up to 2",
                "write ratings 0, 1 and 2, or values from 0 to 1, and not both in one file",
            )
        return float(label) / _TOP_RATING
    if not is_number or not 0 <= label <= 1:  # type: ignore[operator]
        raise DataError(f"{place} has the label {label!r:.80}", "write a value from 0 to 1, or true or false")
    return float(label)  # type: ignore[arg-type]
