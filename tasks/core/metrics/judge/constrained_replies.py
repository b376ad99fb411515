"""Replies of a local judge that can only be JSON of the verdict's form: other tokens are left out at each step.

The library llguidance turns a JSON schema into the tokens that may come next (Willard and Louf 2023, "Efficient
Guided Generation for Large Language Models").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.core.generation.engines.sorted_batches import SortedBatchEngine
from tasks.core.models.tokenizing import eos_token_ids
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch

    from tasks.core.generation.batching import Request
    from tasks.core.models.loading import LoadedModel

# With free white space a small model may write blanks without end.
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ConstrainedBatches(SortedBatchEngine):
    """Answers greedily among the tokens that the row's JSON schema admits; `schemas` are by position."""

    name = "constrained"

    def __init__(
        self, model: LoadedModel, settings: GenerationSettings, schemas: Mapping[int, Mapping[str, Any]]
    ) -> None:
        from llguidance.hf import from_tokenizer

        super().__init__(model, settings)
        self._schemas = schemas
        self._vocabulary = from_tokenizer(model.tokenizer, eos_token=list(self._eos))

    def _processors(self, batch: Sequence[Request], width: int) -> list[Any]:
        schemas = [self._schemas[request.position] for request in batch]
        return [_AdmittedOnly(self._vocabulary, schemas, width, list(self._eos))]


def why_not_constrained(model: LoadedModel) -> str | None:
    """Say why a model's replies cannot be constrained; None when they can."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(model.tokenizer, PreTrainedTokenizerFast):
        return f"its tokenizer {type(model.tokenizer).__name__} does not tell how its tokens are written"
    return None if eos_token_ids(model.model, model.tokenizer) else "it has no token that ends a reply"


def matcher_of(vocabulary: Any, schema: Mapping[str, Any]) -> Any:
    """An llguidance matcher that follows a reply token by token and tells which may come next."""
    from llguidance import LLMatcher

    return LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_WRITING))


class _AdmittedOnly:
    """A logits processor: what a row's schema does not admit after its tokens so far is impossible."""

    def __init__(
        self, vocabulary: Any, schemas: Sequence[Mapping[str, Any]], width: int, end: list[int]
    ) -> None:
        self._read, self._end = width, end
        self._matchers = [matcher_of(vocabulary, schema) for schema in schemas]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        new = input_ids[:, self._read :].tolist()
        self._read = input_ids.shape[1]
        admitted = torch.zeros(scores.shape, dtype=torch.bool)
        for row, matcher in enumerate(self._matchers):
            if not matcher.is_stopped():
                matcher.consume_tokens(new[row])
            if matcher.is_stopped():  # whole, or `generate` fills up a row that has ended
                admitted[row, self._end] = True
            else:
                bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
                size = min(len(bias), scores.shape[1])
                admitted[row, :size] = bias[:size] > 0
        return scores.masked_fill(~admitted.to(scores.device), -float("inf"))
