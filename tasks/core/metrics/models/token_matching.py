"""Texts matched token by token in vectors of a language model: the package bert-score with one model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import EvaluationError, first_line
from tasks.core.models.locating import locate

NOT_INSTALLED = (
    "the package bert-score is not installed",
    "pip install 'tuneproof[bertscore]' (or bert-score)",
)


class TokenMatcher:
    """The package bert-score with one model; `layer` None takes the one it recommends, else the last."""

    def __init__(self, model_id: str, layer: int | None = None) -> None:
        self._model_id = model_id
        self._layer = layer

    def check(self) -> None:
        """Raise a TuneproofError when the package or the model is missing; loads nothing."""
        if importlib.util.find_spec("bert_score") is None:
            raise EvaluationError(*NOT_INSTALLED)
        locate(self._model_id, with_weights=False)

    @cached_property
    def _scorer(self) -> Any:
        try:
            from bert_score import BERTScorer
            from bert_score.utils import model2layers
        except ImportError as error:
            raise EvaluationError(*NOT_INSTALLED) from error
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

    def f1(self, answers: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
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
