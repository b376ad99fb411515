"""A judge on this machine: the model answers through the project's own engines, longest prompts first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tasks.core.metrics.judge.prompts import JudgePrompt
from tasks.core.metrics.judge.replies import Reply, cut_reason
from tasks.core.records import Example, GenerationSettings

if TYPE_CHECKING:
    from tasks.core.generation.batching import Request
    from tasks.core.generation.engines.base import Engine
    from tasks.core.models.loading import LoadedModel, ModelSpec

logger = logging.getLogger(__name__)

DEFAULT_REPLY_TOKENS = 768
"""Longest reply where judge_max_tokens is not set: room for it is kept in memory and in the model's context."""
_LONGEST_PROMPT_TOKENS = 16_384


class LocalJudge:
    """Answers greedily, so that the same prompts give the same verdicts. The model is loaded when first asked.

    Only tokens that the verdict's JSON schema admits are generated, so a reply that ends has the asked form.
    """

    budget_dollars: float | None = None

    def __init__(self, model_id: str, *, max_tokens: int) -> None:
        self.model = model_id
        self._max_tokens = max_tokens
        self.cut_reason = cut_reason(self._max_tokens)

    def check(self) -> None:
        """Raise ModelNotFoundError or ModelLoadError when there is no such model; see JudgeBackend."""
        from tasks.core.models.locating import locate

        locate(self.model, with_weights=False)

    def probe(self) -> None:
        """Look for the model again; see JudgeBackend."""
        self.check()

    @cached_property
    def _spec(self) -> ModelSpec:
        from tasks.core.models.loading import ModelSpec

        return ModelSpec(self.model)

    @cached_property
    def _loaded(self) -> LoadedModel:
        from tasks.core.models.loading import load_model_and_tokenizer

        return load_model_and_tokenizer(self._spec)

    @cached_property
    def identity(self) -> str:
        """Digests of weights and template, and how replies are made; the model is not loaded for it."""
        from tasks.core.models.loading import identify

        return "local json_schema " + json.dumps(identify(self._spec).content(), sort_keys=True)

    @property
    def endpoint(self) -> None:
        """There is none."""

    def cost_dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        """A judge on one's own machine has no price."""
        return None

    def reply(self, prompts: Sequence[JudgePrompt], keep: Callable[[int, Reply], None]) -> None:
        """Answer all prompts; see JudgeBackend. Raises ModelNotFoundError or ModelLoadError."""
        from tasks.core.generation.answering import starting_budget
        from tasks.core.generation.batching import RequestQueue
        from tasks.core.generation.ladder import generate_all

        requests = self._requests(prompts, keep)
        if not requests:
            return
        shortest = min(len(request.token_ids) for request in requests.values())
        prefix = _common_prefix([request.token_ids for request in requests.values()])
        queue = RequestQueue(
            list(requests),
            [len(request.token_ids) for request in requests.values()],
            requests.__getitem__,
            shared_prefix=prefix[: shortest - 1],
            largest_answer_tokens=self._max_tokens,
        )
        settings = GenerationSettings(max_new_tokens=self._max_tokens)
        engine = self._engine(settings, prompts)
        budget = starting_budget(self._loaded, batch_size=None, max_batch_tokens=None)
        for row in generate_all(engine, queue, budget, device=self._loaded.device):
            if row.finish_reason == "error":
                keep(row.position, Reply(failure=row.text, lasting=False))
                continue
            failure = self.cut_reason if row.finish_reason == "length" else None
            input_tokens = len(requests[row.position].token_ids)
            keep(row.position, Reply(row.text, failure, True, input_tokens, len(row.token_ids)))

    def _engine(self, settings: GenerationSettings, prompts: Sequence[JudgePrompt]) -> Engine:
        from tasks.core.generation.engines.choosing import choose_engine
        from tasks.core.metrics.judge.constrained_replies import ConstrainedBatches, why_not_constrained

        reason = why_not_constrained(self._loaded)
        if reason is None:
            schemas = {position: prompt.schema for position, prompt in enumerate(prompts)}
            return ConstrainedBatches(self._loaded, settings, schemas)
        logger.warning("the judge's replies are not held to the form of a verdict: %s", reason)
        return choose_engine("auto", self._loaded, settings).engine

    def _requests(
        self, prompts: Sequence[JudgePrompt], keep: Callable[[int, Reply], None]
    ) -> dict[int, Request]:
        """Requests by position; a prompt that does not fit gets its failure at once."""
        from tasks.core.generation.batching import Request
        from tasks.core.prompts.tokens import PromptBuilder

        config = self._loaded.model.config
        longest = getattr(config, "max_position_embeddings", None) or _LONGEST_PROMPT_TOKENS
        builder = PromptBuilder(
            self._loaded.tokenizer,
            max_sequence_length=min(longest, _LONGEST_PROMPT_TOKENS),
            reserve_tokens=self._max_tokens,
            long_prompts="refuse",
        )
        examples = (
            Example(str(position), prompt.messages[-1].content, messages=prompt.messages)
            for position, prompt in enumerate(prompts)
        )
        requests = {}
        for position, built in enumerate(builder.build_all(examples)):
            if built.problem is None:
                requests[position] = Request(position, built.id, built.token_ids, self._max_tokens)
            else:
                keep(position, Reply(failure=f"the prompt does not fit: {built.problem}", lasting=False))
        return requests


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first, last = min(sequences), max(sequences)
    same = (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return first[: next(same, len(first))]
