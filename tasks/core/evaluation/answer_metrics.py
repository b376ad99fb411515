"""Metrics that look for the answer inside the text: contains, last number, pattern, JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache, partial
from typing import Any

import numpy as np

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.metric import NO_REFERENCE, BatchScores, Metric, MetricFamily, Pairwise
from tasks.core.evaluation.overlap_metrics import normalize_answer
from tasks.core.records import Prediction

_NUMBER = (
    r"(?<!\w)(?<!\d\.)"  # not inside a word, and not the rest of another number
    r"[-+\N{MINUS SIGN}]?[$\N{EURO SIGN}\N{POUND SIGN}]?[-\N{MINUS SIGN}]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)"
    r"(?:[eE][-+]?\d+)?"
)
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####[ \t]*({_NUMBER})")
_NOT_OF_A_NUMBER = re.compile(r"[,+$\N{EURO SIGN}\N{POUND SIGN}]")
_RELATIVE_TOLERANCE = Decimal("1e-9")

# Scripts written without spaces between words: a neighbouring letter does not make it another word.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_FENCE = re.compile(r"\A\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)

# What compiling raises: wrong syntax, a repetition that is too large, groups within groups without end.
_NO_PATTERN = (re.error, OverflowError, RecursionError)


def contains(answer: str, reference: str) -> float | None:
    """1 when the normalised reference stands in the normalised answer as whole words; None for no words."""
    wanted, text = normalize_answer(reference), normalize_answer(answer)
    if not wanted:
        return None
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not _joined(text, start) and not _joined(text, end):
            return 1.0
        start = text.find(wanted, start + 1)
    return 0.0


def _joined(text: str, position: int) -> bool:
    """Whether the characters on both sides of a position belong to one word."""
    pair = text[max(position - 1, 0) : position + 1] if 0 < position < len(text) else ""
    return len(pair) == 2 and pair.isalnum() and not _UNSPACED.search(pair)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####` (as GSM8K writes results), else the last number in the text.

    Thousands commas, currency signs and a leading plus are ignored; `-` counts only at a word's start.
    """
    found = _MARKED_NUMBER.findall(text) or _ANY_NUMBER.findall(text)
    if not found:
        return None
    written = _NOT_OF_A_NUMBER.sub("", found[-1]).replace("\N{MINUS SIGN}", "-")
    try:
        return Decimal(written)
    except InvalidOperation:
        return None


def numeric_match(answer: str, reference: str) -> float | None:
    """1 when both end in the same number (relative tolerance 1e-9); None when the reference has none."""
    wanted = final_number(reference)
    if wanted is None:
        return None
    found = final_number(answer)
    if found is None:
        return 0.0
    try:
        return float(abs(found - wanted) <= _RELATIVE_TOLERANCE * max(abs(found), abs(wanted)))
    except ArithmeticError:  # exponents beyond what can be subtracted
        return float(found == wanted)


def regex_match(answer: str, reference: str) -> float | None:
    """1 when the reference, read as a regular expression, is found in the answer; None when it is none."""
    try:
        return float(re.search(reference, answer) is not None)
    except _NO_PATTERN:
        return None


def parse_json(text: str) -> Any:
    """The JSON value of a text, which may stand in a code fence. Raises ValueError when it is not JSON."""
    fenced = _FENCE.match(text)
    try:
        return json.loads(
            fenced.group(1) if fenced else text, parse_constant=_refuse_constant, parse_int=_integer
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _is_found(pattern: str, answer: str) -> float:
    return float(_compiled(pattern).search(answer) is not None)


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
        unscored_when="never",
    )
    return MetricFamily(
        name, (metric,), partial(score_without_reference, metric=name, function=partial(_is_found, pattern))
    )


def _against_reference(
    name: str, function: Callable[[str, str], float | None], description: str, source: str, undecided: str
) -> MetricFamily:
    metric = Metric(name, description, source, kind="binary", unscored_when=f"{NO_REFERENCE}, or {undecided}")
    return MetricFamily(name, (metric,), Pairwise(name, function, undecided))


ANSWER_FAMILIES = (
    _against_reference(
        "contains",
        contains,
        "The reference stands in the answer as whole words, normalised as for exact match.",
        "SQuAD normalisation",
        "the reference has no words",
    ),
    _against_reference(
        "numeric_match",
        numeric_match,
        "The last number of the answer is that of the reference; a number after #### comes first.",
        "GSM8K's form of results",
        "the reference has no number",
    ),
    _against_reference(
        "regex_match",
        regex_match,
        "The reference, read as a regular expression, is found in the answer.",
        "Python re.search",
        "the reference is no regular expression",
    ),
    MetricFamily(
        "json_valid",
        (
            Metric(
                "json_valid",
                "The answer is JSON, alone or in a code fence.",
                "RFC 8259",
                kind="binary",
                unscored_when="never",
            ),
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
