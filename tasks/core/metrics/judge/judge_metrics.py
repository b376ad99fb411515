"""Metrics that a judge model scores. Verdicts are kept, so a row is judged once, whatever is changed later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from tasks.core.metrics.judge.judge import NoVerdict
from tasks.core.metrics.judge.judged import Bias, BothOrders, Judged, PositionBias
from tasks.core.metrics.judge.prompts import (
    AccuracyVerdict,
    FactualVerdict,
    JudgePrompt,
    PreferenceVerdict,
    RelevancyVerdict,
    Texts,
    Verdict,
    accuracy_prompt,
    factual_prompt,
    preference_prompt,
    relevancy_prompt,
)
from tasks.core.metrics.metric import (
    NO_PARTNER,
    NO_REFERENCE,
    BatchScores,
    FloatArray,
    Metric,
    Sources,
    asking,
    pairing,
)
from tasks.core.metrics.similarity_metrics import SEMANTIC_SIMILARITY, SimilarityScore, cosines
from tasks.core.records import Prediction

NO_CLAIM = "the judge found no claim in the reference"
_FACTUAL_WEIGHT = 0.75
_TOP_RATING = 2
_FAILS = "the judge has no verdict"

FACTUAL_CORRECTNESS = Metric(
    "factual_correctness",
    "F1 over claims: those of the answer that the reference supports, and those of the reference it covers.",
    "Min et al. 2023 (claims); Es et al. 2023, Ragas (F1)",
    unscored_when=f"{NO_REFERENCE}, {NO_CLAIM}, or {_FAILS}",
)
ANSWER_ACCURACY = Metric(
    "answer_accuracy",
    "How far the judge finds answer and reference to say the same, asked twice with the roles swapped.",
    "Ragas, answer accuracy",
    unscored_when=f"{NO_REFERENCE}, or {_FAILS}",
)
ANSWER_RELEVANCY = Metric(
    "answer_relevancy",
    "Similarity of the question to questions that the judge writes for the answer; 0 if noncommittal.",
    "Es et al. 2023 (Ragas)",
    unscored_when=f"{_FAILS}, or an embedding endpoint fails",
)
ANSWER_CORRECTNESS = Metric(
    "answer_correctness",
    "0.75 times factual_correctness and 0.25 times semantic_similarity.",
    "Ragas, answer correctness",
    unscored_when="factual_correctness or semantic_similarity is",
)
PREFERENCE = Metric(
    "preference",
    "Share of rows on which the judge prefers this answer to the other run's; a tie is a half.",
    "Zheng et al. 2023 (both orders are asked)",
    unscored_when=f"{NO_PARTNER}, or {_FAILS}",
)


def ask_rows(
    sources: Sources, prompts: dict[int, list[JudgePrompt]], reasons: list[str | None]
) -> dict[int, list[Verdict]]:
    """Verdicts of each row that has them all; for the others the first reason is noted."""
    flat = [prompt for row_prompts in prompts.values() for prompt in row_prompts]
    verdicts = iter(sources.judge.ask(flat)) if flat else iter(())
    complete: dict[int, list[Verdict]] = {}
    for i, row_prompts in prompts.items():
        outcomes = [next(verdicts) for _ in row_prompts]
        missing = next((outcome for outcome in outcomes if isinstance(outcome, NoVerdict)), None)
        if missing is None:
            complete[i] = cast(list[Verdict], outcomes)
        else:
            reasons[i] = missing.reason
    return complete


def _start(
    rows: Sequence[Prediction], *, with_reference: bool
) -> tuple[FloatArray, list[str | None], list[int]]:
    """Values (0 for error rows, which the caller's policy settles), reasons, and the rows to judge."""
    reasons = [NO_REFERENCE if with_reference and row.ground_truth is None else None for row in rows]
    values = np.array([np.nan if row.error is None else 0.0 for row in rows])
    judged = [i for i, row in enumerate(rows) if reasons[i] is None and row.error is None]
    return values, reasons, judged


@dataclass(frozen=True, slots=True)
class JudgedScore:
    """Scores rows that have a reference by the judge's verdicts on each; `no_value` says why they may give none."""

    metric: Metric
    prompts: Callable[[Prediction], list[JudgePrompt]]
    value: Callable[[Sequence[Verdict]], float | None]
    no_value: str
    sources: Sources

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        values, reasons, judged = _start(rows, with_reference=True)
        prompts = {i: self.prompts(rows[i]) for i in judged}
        for i, verdicts in ask_rows(self.sources, prompts, reasons).items():
            value = self.value(verdicts)
            reasons[i] = self.no_value if value is None else None
            values[i] = np.nan if value is None else value
        return BatchScores({self.metric.name: values}, reasons)


def _facts(row: Prediction) -> list[JudgePrompt]:
    return [factual_prompt(row.question, row.predicted_answer, row.references)]


def _f1(verdicts: Sequence[Verdict]) -> float | None:
    """F1 of claims: right are supported ones of the answer, wrong its others, missing what it does not cover."""
    return cast(FactualVerdict, verdicts[0]).f1


_FactualScore = partial(JudgedScore, FACTUAL_CORRECTNESS, _facts, _f1, NO_CLAIM)


def _accuracy_prompts(question: str, answer: str, _: str, reference: Texts) -> list[JudgePrompt]:
    reference = reference or ""
    return [accuracy_prompt(question, answer, reference), accuracy_prompt(question, reference, answer)]


def _ratings(verdicts: Sequence[Verdict]) -> FloatArray:
    return np.array([cast(AccuracyVerdict, verdict).rating for verdict in verdicts]) / _TOP_RATING


def _accuracy(verdicts: Sequence[Verdict]) -> float:
    return float(_ratings(verdicts).mean())


def _accuracy_bias(verdicts: Sequence[Sequence[Verdict]]) -> PositionBias:
    straight, swapped = np.stack([_ratings(both) for both in verdicts], axis=1)
    favoured = Bias("answer first less reference first", float((straight - swapped).mean()), unbiased=0.0)
    return PositionBias(len(verdicts), int((straight != swapped).sum()), favoured)


def _accuracies(row: Prediction) -> list[JudgePrompt]:
    return _accuracy_prompts(row.question, row.predicted_answer, "", row.references)


@dataclass(frozen=True, slots=True)
class RelevancyScore:
    """Mean cosine (0 to 1) of the question and questions written for the answer; 0 when it is noncommittal.

    It tells whether the answer is about the question, not whether it is right. Needs no reference.
    """

    sources: Sources

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        """Judge and embed a batch; one call a row."""
        values, reasons, judged = _start(rows, with_reference=False)
        prompts = {i: [relevancy_prompt(rows[i].predicted_answer)] for i in judged}
        pairs: list[tuple[int, str]] = []
        for i, (verdict,) in ask_rows(self.sources, prompts, reasons).items():
            found = cast(RelevancyVerdict, verdict)
            values[i] = 0.0
            pairs += [] if found.noncommittal else [(i, question) for question in found.questions]
        if pairs:
            texts = [question for _, question in pairs] + [rows[i].question for i, _ in pairs]
            vectors, failures = self.sources.embedder.embed(texts)
            similar = cosines(vectors[: len(pairs)], vectors[len(pairs) :])
            sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
            for place, (i, _) in enumerate(pairs):
                reasons[i] = reasons[i] or failures[place] or failures[place + len(pairs)]
                sums[i], counts[i] = sums[i] + similar[place], counts[i] + 1
            values = np.where(counts > 0, sums / np.maximum(counts, 1), values)
        values[[i for i, reason in enumerate(reasons) if reason is not None]] = np.nan
        return BatchScores({ANSWER_RELEVANCY.name: values}, reasons)


@dataclass(frozen=True, slots=True)
class CorrectnessScore:
    """Weighted mean (0 to 1) of facts and meaning, with Ragas' weights; shares its calls with factual_correctness."""

    sources: Sources

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        facts = _FactualScore(self.sources)(rows)
        meaning = SimilarityScore(self.sources)(rows)
        values = (
            _FACTUAL_WEIGHT * facts.values[FACTUAL_CORRECTNESS.name]
            + (1 - _FACTUAL_WEIGHT) * meaning.values[SEMANTIC_SIMILARITY.name]
        )
        reasons = [first or second for first, second in zip(facts.reasons, meaning.reasons, strict=True)]
        return BatchScores({ANSWER_CORRECTNESS.name: values}, reasons)


def _preference_prompts(question: str, mine: str, other: str, reference: Texts) -> list[JudgePrompt]:
    return [
        preference_prompt(question, mine, other, reference),
        preference_prompt(question, other, mine, reference),
    ]


def _preference(verdicts: Sequence[Verdict]) -> float:
    """A win or a loss only where the verdicts on both orders agree."""
    straight, swapped = (cast(PreferenceVerdict, verdict).better for verdict in verdicts)
    agreed = {("first", "second"): PREFERENCE.maximum, ("second", "first"): PREFERENCE.minimum}
    return agreed.get((straight, swapped), PREFERENCE.middle)


def _preference_bias(verdicts: Sequence[Sequence[Verdict]]) -> PositionBias:
    mirrored = {"first": "second", "second": "first", "tie": "tie"}
    chosen = [[cast(PreferenceVerdict, verdict).better for verdict in both] for both in verdicts]
    choices = [better for both in chosen for better in both if better != "tie"]
    changed = sum(mirrored[one] != other for one, other in chosen)
    if not choices:
        return PositionBias(len(chosen), changed, None)
    share = choices.count("first") / len(choices)
    favoured = Bias("choices of what stands first", share, unbiased=0.5, is_share=True)
    return PositionBias(len(chosen), changed, favoured)


@dataclass(frozen=True, slots=True)
class PreferenceScore:
    """Win, tie, loss are 1, a half and 0. Both orders are asked (Zheng et al. 2023); verdicts that change with

    the order are a tie, as are equal answers, which are not asked. Two calls a row.
    """

    sources: Sources

    def __call__(self, pairs: Sequence[tuple[Prediction, Prediction]]) -> BatchScores:
        values, reasons = np.full(len(pairs), PREFERENCE.middle), cast(list[str | None], [None] * len(pairs))
        prompts = {
            i: _preference_prompts(
                mine.question, mine.predicted_answer, other.predicted_answer, mine.references
            )
            for i, (mine, other) in enumerate(pairs)
            if mine.predicted_answer != other.predicted_answer
        }
        verdicts = ask_rows(self.sources, prompts, reasons)
        for i in prompts:
            values[i] = _preference(verdicts[i]) if i in verdicts else np.nan
        return BatchScores({PREFERENCE.name: values}, reasons)


JUDGE_FAMILIES = (
    asking(
        FACTUAL_CORRECTNESS,
        _FactualScore,
        "judge",
        needs="a judge",
        note="takes answer and reference apart into claims. Claims of the answer that the reference supports are "
        "right, its others are wrong, claims of the reference that the answer leaves out are missing; the value is "
        "F1 = 2 right / (2 right + wrong + missing).",
        judged=Judged(partial(factual_prompt, "", "", "")),
    ),
    asking(
        ANSWER_ACCURACY,
        partial(JudgedScore, ANSWER_ACCURACY, _accuracies, _accuracy, _FAILS),
        "judge",
        needs="a judge (two calls a row)",
        note="is the mean of two ratings (0, a half, 1), with answer and reference in either order.",
        judged=Judged(
            partial(accuracy_prompt, "", "", ""),
            top_rating=_TOP_RATING,
            orders=BothOrders(_accuracy_prompts, _accuracy, _accuracy_bias),
        ),
    ),
    asking(
        ANSWER_RELEVANCY,
        RelevancyScore,
        "judge",
        "embedding",
        needs="a judge and an embedding model",
        note="tells whether the answer is about the question, not whether it is right.",
        judged=Judged(partial(relevancy_prompt, ""), labels_need_reference=False),
    ),
    asking(
        ANSWER_CORRECTNESS,
        CorrectnessScore,
        "judge",
        "embedding",
        needs="a judge and an embedding model; shares its call with `factual_correctness`",
        judged=Judged(partial(factual_prompt, "", "", "")),
    ),
    pairing(
        PREFERENCE,
        PreferenceScore,
        "judge",
        needs="a judge (two calls a row) and a run to compare with",
        note="is 1, a half or 0 for a row. Both orders are asked, and a verdict that changes with the order is a tie. "
        "The candidate's figure is its win rate with ties as halves; the baseline's is the rest. In the comparison, "
        "wins, ties and losses are those of the judge, and the difference is the share of wins minus the share of "
        "losses.",
        judged=Judged(
            partial(preference_prompt, "", "", "", ""),
            labels_need_reference=False,
            of_two_answers=True,
            orders=BothOrders(_preference_prompts, _preference, _preference_bias),
        ),
    ),
)
