"""Metrics that look for the answer inside the text: contains, last number, pattern, JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np

from tasks.core.data.normalising import contains_words
from tasks.core.errors import EvaluationError
from tasks.core.metrics.gsm8k import gsm8k_match
from tasks.core.metrics.metric import NO_REFERENCE, BatchScores, Metric, MetricFamily, compared, single
from tasks.core.metrics.numbers import numeric_match
from tasks.core.records import Prediction

_FENCE = "```"
_FENCE_LANGUAGE = re.compile(r"[\w-]*\s*\n")
_PATTERN_SECONDS = 1.0
"""A pattern that looks longer at one answer is given up; some patterns take exponential time."""
_MOST_TIMEOUTS = 5

TOO_LONG = "the pattern takes too long"

# What compiling raises: wrong syntax, a repetition that is too large, groups within groups without end.
_NO_PATTERN = (re.error, OverflowError, RecursionError)


def contains(answer: str, reference: str) -> float | None:
    """1 when the words of the reference stand one after another in the answer; None for no words."""
    found = contains_words(answer, reference)
    return None if found is None else float(found)


def regex_match(answer: str, reference: str) -> float | None:
    """1 when the reference, read as a regular expression, is found in the answer; None when it is none.

    None too when it looks for longer than a second.
    """
    try:
        return float(_is_found(reference, answer))
    except (*_NO_PATTERN, TimeoutError):
        return None


def _is_found(pattern: str, answer: str) -> bool:
    """Raises TimeoutError after `_PATTERN_SECONDS`."""
    import regex

    re.compile(pattern)  # what Python's own module does not read is no pattern here either
    return regex.search(pattern, answer, timeout=_PATTERN_SECONDS) is not None


def parse_json(text: str) -> Any:
    """The JSON value of a text, which may stand in a code fence. Raises ValueError when it is not JSON."""
    try:
        return json.loads(_unfenced(text), parse_constant=_refuse_constant, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unfenced(text: str) -> str:
    """What stands in a code fence that is all of the text; else the text."""
    inner = text.strip()
    if not (inner.startswith(_FENCE) and inner.endswith(_FENCE)):
        return text
    begins = _FENCE_LANGUAGE.match(inner, len(_FENCE))
    return (
        text
        if begins is None or begins.end() > len(inner) - len(_FENCE)
        else inner[begins.end() : -len(_FENCE)]
    )


def _integer(digits: str) -> int | Decimal:
    """Python refuses to read an integer of more than 4,300 digits; JSON allows it."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def json_match(answer: str, reference: str) -> float | None:
    """1 when both are the same JSON value; the order of keys and 1 against 1.0 do not matter."""
    try:
        wanted = parse_json(reference)
    except ValueError:
        return None
    try:
        return float(_same_json(parse_json(answer), wanted))
    except (ValueError, RecursionError):
        return 0.0


def _same_json(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same_json(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same_json, first, second))
    # In Python True == 1; in JSON they are different things.
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, float) and isinstance(second, float):
        return first == second or math.isclose(first, second, rel_tol=1e-12)
    return bool(first == second)


def score_without_reference(
    rows: Sequence[Prediction], *, metric: str, function: Callable[[str], float]
) -> BatchScores:
    """Score rows one by one by their answers alone; no row is unscored."""
    values = np.array([function(row.predicted_answer) for row in rows], dtype=np.float64)
    return BatchScores({metric: values}, [None] * len(rows))


def _is_json(answer: str) -> float:
    try:
        parse_json(answer)
    except ValueError:
        return 0.0
    return 1.0


class PatternScore:
    """Scores rows by whether one pattern is found; a pattern that takes too long again and again is given up."""

    def __init__(self, metric: str, pattern: str) -> None:
        self._metric, self._pattern = metric, pattern
        self._timeouts = 0

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        values = np.full(len(rows), np.nan)
        reasons: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if self._timeouts < _MOST_TIMEOUTS:
                try:
                    values[i] = _is_found(self._pattern, row.predicted_answer)
                    continue
                except TimeoutError:
                    self._timeouts += 1
            reasons[i] = TOO_LONG
        return BatchScores({self._metric: values}, reasons)


def pattern_family(pattern: str) -> MetricFamily:
    """The metric `regex_match:PATTERN`. Raises EvaluationError for a pattern that is none."""
    name = f"regex_match:{pattern}"
    try:
        re.compile(pattern)
    except _NO_PATTERN as error:
        raise EvaluationError(f"metric {name!r}: {error}", "correct the regular expression") from error
    metric = Metric(
        name,
        f"The pattern {pattern} is found in the answer.",
        "Python re.search",
        kind="binary",
        unscored_when=TOO_LONG,
    )
    return single(metric, PatternScore(name, pattern))


def _against_reference(
    name: str, function: Callable[[str, str], float | None], description: str, source: str, undecided: str
) -> MetricFamily:
    metric = Metric(name, description, source, kind="binary", unscored_when=f"{NO_REFERENCE}, or {undecided}")
    return compared(metric, function, undecided)


ANSWER_FAMILIES = (
    _against_reference(
        "contains",
        contains,
        "The words of the reference stand one after another in the answer, in the form of exact match.",
        "tasks/core/data/normalising.py",
        "the reference has no words",
    ),
    _against_reference(
        "numeric_match",
        numeric_match,
        'The answer ends in the value of the reference: what is boxed, stands behind ####, follows "the answer is", '
        "is one side of an equation, or comes last. Whole numbers exactly, others within 1e-9; 50 %, 50 and 0.5 are "
        "the same.",
        "tasks/core/metrics/numbers.py",
        "the reference has no value",
    ),
    _against_reference(
        "gsm8k_strict",
        partial(gsm8k_match, how="strict"),
        "The number behind the first #### is the reference's, as texts without commas, $ and a full stop.",
        "lm-evaluation-harness, task gsm8k, filter strict-match",
        "never else",
    ),
    _against_reference(
        "gsm8k_flexible",
        partial(gsm8k_match, how="flexible"),
        "The last thing that looks like a number is the reference's, as texts without commas, $ and a full stop.",
        "lm-evaluation-harness, task gsm8k, filter flexible-extract",
        "never else",
    ),
    _against_reference(
        "regex_match",
        regex_match,
        "The reference, read as a regular expression, is found in the answer.",
        "Python re.search",
        "the reference is no regular expression, or takes longer than a second",
    ),
    single(
        Metric(
            "json_valid",
            "The answer is JSON, alone or in a code fence.",
            "RFC 8259",
            kind="binary",
            unscored_when="never",
        ),
        partial(score_without_reference, metric="json_valid", function=_is_json),
    ),
    _against_reference(
        "json_match",
        json_match,
        "Answer and reference are the same JSON value; the order of keys does not matter.",
        "RFC 8259",
        "the reference is not JSON",
    ),
)
