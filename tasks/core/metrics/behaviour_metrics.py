"""Metrics of how a model answers, whatever is right: length, empty answers, refusals, cut answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from tasks.core.metrics.answer_metrics import score_without_reference
from tasks.core.metrics.metric import BatchScores, Direction, Kind, Metric, MetricFamily, WatchedRate, single
from tasks.core.records import Prediction

NO_TOKEN_COUNT = "the run did not count tokens"
NO_THOUGHT_COUNT = "the tokens of its thoughts were not counted"
NO_FINISH_REASON = "the run does not say how the answer ended"

# Openings by which models decline in English; a heuristic, looked for in the first 200 characters.
_REFUSAL = re.compile(
    r"""(?ix) \b(?:
        i(?:['\u2019]m|\ am)\ (?:really\ |very\ |so\ )?(?:sorry|unable|not\ able|afraid)
      | i\ (?:can(?:not|['\u2019]t|\ not)|won['\u2019]?t|will\ not|could\ not|must\ decline)\b
        (?:\ (?:help|assist|answer|provide|comply|do|fulfil+|create|generate|write|support|discuss|engage|share|give))
      | i\ (?:do\ not|don['\u2019]t)\ (?:feel\ comfortable|have\ (?:access|the\ ability|enough\ information))
      | as\ an\ ai\b | as\ a\ (?:large\ )?language\ model
      | (?:my\ )?apologies,?\ but\ i | against\ my\ (?:guidelines|programming)
    )"""
)
_OPENING_CHARACTERS = 200


def _is_empty(answer: str) -> float:
    return float(not answer.strip())


def is_refusal(answer: str) -> float:
    """1 when the answer opens the way models decline to answer (English only), else 0."""
    return float(_REFUSAL.search(answer[:_OPENING_CHARACTERS]) is not None)


def _score_truncation(rows: Sequence[Prediction]) -> BatchScores:
    endings = [row.metadata.finish_reason for row in rows]
    values = np.array([np.nan if ending is None else float(ending == "length") for ending in endings])
    return BatchScores(
        {"truncation_rate": values}, [NO_FINISH_REASON if ending is None else None for ending in endings]
    )


def _score_length(rows: Sequence[Prediction]) -> BatchScores:
    return BatchScores(
        {
            "answer_characters": np.array([len(row.predicted_answer) for row in rows], dtype=np.float64),
            "answer_words": np.array([len(row.predicted_answer.split()) for row in rows], dtype=np.float64),
        },
        [None] * len(rows),
    )


def _score_cut_in_thoughts(rows: Sequence[Prediction]) -> BatchScores:
    values = np.array([float(row.metadata.is_cut_in_thoughts) for row in rows])
    return BatchScores({"cut_in_thoughts_rate": values}, [None] * len(rows))


def _score_tokens(rows: Sequence[Prediction]) -> BatchScores:
    """Tokens of the answers alone: those of the thoughts are not theirs."""
    values, reasons = np.full(len(rows), np.nan), list[str | None]()
    for i, row in enumerate(rows):
        count, thoughts = row.metadata.token_count, row.metadata.reasoning_tokens
        has_uncounted = not thoughts and (row.reasoning is not None or row.metadata.is_cut_in_thoughts)
        reasons.append(NO_TOKEN_COUNT if count is None else NO_THOUGHT_COUNT if has_uncounted else None)
        if count is not None and not has_uncounted:
            values[i] = count - thoughts
    return BatchScores({"answer_tokens": values}, reasons)


def _behaviour(
    name: str,
    description: str,
    source: str,
    *,
    kind: Kind = "binary",
    direction: Direction = "lower",
    maximum: float = 1.0,
    unscored: str = "",
    watched_rate: WatchedRate | None = None,
) -> Metric:
    return Metric(
        name,
        description,
        source,
        kind=kind,
        direction=direction,
        maximum=maximum,
        unscored_when="an error row" + (f", or {unscored}" if unscored else ""),
        errors_are_wrong=False,
        watched_rate=watched_rate,
    )


_length = partial(_behaviour, kind="continuous", direction="none", maximum=float("inf"))

BEHAVIOUR_FAMILIES = (
    MetricFamily(
        "length",
        (
            _length("answer_characters", "Characters of the answer.", "Unicode code points"),
            _length("answer_words", "Words of the answer.", "split at white space"),
        ),
        _score_length,
    ),
    MetricFamily(
        "token_length",
        (
            _length(
                "answer_tokens",
                "Tokens of the answer, without those of its thoughts.",
                "the model's tokenizer",
                unscored=f"{NO_TOKEN_COUNT}, or {NO_THOUGHT_COUNT}",
            ),
        ),
        _score_tokens,
    ),
    single(
        _behaviour("empty_rate", "The answer is empty or only white space.", "text", watched_rate="empty"),
        partial(score_without_reference, metric="empty_rate", function=_is_empty),
    ),
    single(
        _behaviour("refusal_rate", "The answer opens as models decline in English.", "a list of phrases"),
        partial(score_without_reference, metric="refusal_rate", function=is_refusal),
    ),
    single(
        _behaviour(
            "truncation_rate",
            "The answer was cut at the token limit.",
            "finish reason of the run",
            unscored=NO_FINISH_REASON,
            watched_rate="cut",
        ),
        _score_truncation,
    ),
    single(
        _behaviour(
            "cut_in_thoughts_rate",
            "The model's thoughts never ended, so there is no answer.",
            "markers of thoughts; see docs/thinking-models.md",
        ),
        _score_cut_in_thoughts,
    ),
)
