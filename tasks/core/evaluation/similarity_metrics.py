"""Metrics that compare meanings: cosine of sentence vectors, and BERTScore's matching of token vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tasks.core.errors import EvaluationError, first_line
from tasks.core.evaluation.embedding import Vectors
from tasks.core.evaluation.metric import (
    NO_REFERENCE,
    BatchScores,
    FloatArray,
    Metric,
    MetricFamily,
    NeedsModels,
    ScoredRun,
    ScoreRows,
    Sources,
    row_of_reference,
)
from tasks.core.models.locating import locate
from tasks.core.records import Prediction

SEMANTIC_SIMILARITY = Metric(
    "semantic_similarity",
    "Cosine of the sentence vectors of answer and reference; a negative one counts as 0.",
    "Reimers and Gurevych 2019; Risch et al. 2021",
    unscored_when=f"{NO_REFERENCE}, or an embedding endpoint fails",
)
BERT_SCORE = Metric(
    "bert_score",
    "F1 of the best matches between token vectors of answer and reference, without rescaling.",
    "Zhang et al. 2020, the package bert-score",
)

_NOT_INSTALLED = (
    "the package bert-score is not installed",
    "pip install 'tuneproof[bertscore]' (or bert-score)",
)


def cosines(left: Vectors, right: Vectors) -> FloatArray:
    """Cosines (n,) of pairs of unit vectors (n, d), cut to 0 to 1."""
    similar: FloatArray = np.einsum("nd,nd->n", left, right, dtype=np.float64)
    return np.clip(similar, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class SimilarityScore:
    """Scores rows by the embedding model of `sources`."""

    sources: Sources

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        """Embed answers and references of a batch at once."""
        values = np.full(len(rows), np.nan)
        reasons: list[str | None] = [NO_REFERENCE if row.ground_truth is None else None for row in rows]
        asked = [i for i, row in enumerate(rows) if reasons[i] is None and row.error is None]
        values[[i for i, row in enumerate(rows) if reasons[i] is None and row.error is not None]] = 0.0
        if asked:
            chosen = [rows[i] for i in asked]
            place_of_pair = row_of_reference(chosen)
            texts = [row.predicted_answer for row in chosen]
            texts += [reference for row in chosen for reference in row.references]
            vectors, failures = self.sources.embedder.embed(texts)
            similar = cosines(vectors[place_of_pair], vectors[len(asked) :])
            for pair, place in enumerate(place_of_pair.tolist()):
                i, failure = asked[place], failures[place] or failures[len(asked) + pair]
                reasons[i] = reasons[i] or failure
                values[i] = np.fmax(values[i], similar[pair])
            values[[i for i in asked if reasons[i] is not None]] = np.nan
        return BatchScores({SEMANTIC_SIMILARITY.name: values}, reasons)


class TokenMatcher:
    """The package bert-score with one model; `layer` None takes the one it recommends, else the last."""

    def __init__(self, model_id: str, layer: int | None = None) -> None:
        self._model_id = model_id
        self._layer = layer

    def check(self) -> None:
        """Raise a TuneproofError when the package or the model is missing; loads nothing."""
        if importlib.util.find_spec("bert_score") is None:
            raise EvaluationError(*_NOT_INSTALLED)
        locate(self._model_id, with_weights=False)

    @cached_property
    def _scorer(self) -> Any:
        try:
            from bert_score import BERTScorer
            from bert_score.utils import model2layers
        except ImportError as error:
            raise EvaluationError(*_NOT_INSTALLED) from error
        try:
            from transformers import AutoConfig

            layer = self._layer or model2layers.get(self._model_id)
            layer = layer or AutoConfig.from_pretrained(self._model_id).num_hidden_layers
            return BERTScorer(model_type=self._model_id, num_layers=layer, use_fast_tokenizer=True)
        except Exception as error:
            raise EvaluationError(
                f"the model of bert_score {self._model_id!r} cannot be loaded: {first_line(error)}",
                "set bert_score_model in [evaluator] to a folder or Hub id of an encoder, and bert_score_layer "
                "to one of its layers",
            ) from error

    def f1(self, answers: Sequence[str], references: Sequence[str]) -> FloatArray:
        """BERTScore's F1 of each pair, not rescaled; 0 where a text is blank, as the package defines it."""
        values = np.zeros(len(answers))
        # With transformers 5 the package fails on blank texts, which it means to score 0.
        asked = [
            i for i, pair in enumerate(zip(answers, references, strict=True)) if all(map(str.strip, pair))
        ]
        if asked:
            _, _, found = self._scorer.score([answers[i] for i in asked], [references[i] for i in asked])
            values[asked] = np.clip(found.double().numpy(), 0.0, 1.0)
        return values


@dataclass(frozen=True, slots=True)
class TokenMatchScore:
    """Scores rows by bert-score."""

    sources: Sources

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        """Match a batch at once."""
        values = np.full(len(rows), np.nan)
        reasons: list[str | None] = [NO_REFERENCE if row.ground_truth is None else None for row in rows]
        row_of_pair = row_of_reference(rows)
        if len(row_of_pair):
            found = self.sources.token_matcher.f1(
                [rows[i].predicted_answer for i in row_of_pair],
                [reference for row in rows for reference in row.references],
            )
            np.fmax.at(values, row_of_pair, found)
        return BatchScores({BERT_SCORE.name: values}, reasons)


def _bind_similarity(run: ScoredRun) -> ScoreRows:
    return SimilarityScore(run.sources)


def _bind_token_match(run: ScoredRun) -> ScoreRows:
    return TokenMatchScore(run.sources)


SIMILARITY_FAMILIES = (
    MetricFamily(
        "semantic_similarity",
        (SEMANTIC_SIMILARITY,),
        NeedsModels("semantic_similarity"),
        in_process=True,
        bind=_bind_similarity,
    ),
    MetricFamily(
        "bert_score", (BERT_SCORE,), NeedsModels("bert_score"), in_process=True, bind=_bind_token_match
    ),
)
