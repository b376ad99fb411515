"""The engine of reference scores: rows with their references go in, negative log-likelihoods come out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.generation.engines.faults import Faults
from tasks.core.generation.engines.fused_layers import fused_layers
from tasks.core.generation.engines.inflight import PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU, Prefix
from tasks.core.generation.engines.packed_attention import packed_attention
from tasks.core.generation.engines.rotary import independent_tokens
from tasks.core.generation.engines.slots import Row, SlotCache
from tasks.core.generation.engines.step import StepPlan, forward
from tasks.core.memory.budget import TokenBudget

if TYPE_CHECKING:
    import torch

    from tasks.core.models.loading import LoadedModel

# Of a padded batch.
_PADDED_TOKENS = 8192
# A row that is longer than a step goes through it in stretches of at least so many tokens.
_SMALLEST_STRETCH_TOKENS = 64


class ReferenceScorer:
    """An engine that generates nothing: `losses` has the negative log-likelihood of each finished row's reference.

    Rows go through the unpadded steps of the in-flight engine (`packs`), or padded batches where those are not right.
    """

    name = "reference_scorer"

    def __init__(self, model: LoadedModel, answer_starts: dict[int, int], *, packs: bool) -> None:
        self._model = model
        self._starts = answer_starts
        self._packs = packs
        self._faults = Faults(model)
        self._prefix = Prefix()
        self._independent_tokens = independent_tokens(model.model)
        self._stretch_tokens = self._step_tokens
        self.losses: dict[int, float] = {}

    def unsupported(self) -> str | None:
        return None

    @property
    def _step_tokens(self) -> int:
        if not self._packs:
            return _PADDED_TOKENS
        return PREFILL_TOKENS_CPU if self._model.device == "cpu" else PREFILL_TOKENS_GPU

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        with ExitStack() as stack:
            if self._packs:
                stack.enter_context(packed_attention(self._model.model))
                stack.enter_context(fused_layers(self._model.model))
                self._prefix = Prefix.of(queue, self._model, budget, self._step_tokens)
            while queue:
                # Activations of a whole forward pass are larger than a cache entry, so a quarter of the budget.
                most_tokens = min(self._step_tokens, max(1, budget.limit_tokens // 4))
                self._stretch_tokens = max(_SMALLEST_STRETCH_TOKENS, most_tokens)
                batch = queue.take_batch(
                    most_tokens, budget.max_rows, alone_beyond_tokens=self._independent_tokens
                )
                tokens = sum(request.room_tokens for request in batch) + self._prefix.tokens
                budget.admit(len(batch), tokens, queue.only_taken_id)
                started = time.perf_counter()
                losses = self._losses(batch)
                budget.clean_batch()
                seconds = time.perf_counter() - started
                for request, loss in zip(batch, losses, strict=True):
                    queue.finish(request.position)
                    yield self._row(request, loss, seconds, len(batch))

    def _row(self, request: Request, loss: float, seconds: float, rows: int) -> GeneratedRow:
        if math.isfinite(loss):
            self.losses[request.position] = loss
            return GeneratedRow(request.position, (), "", "stop", seconds, rows)
        if loss == math.inf:
            text = "the model holds a token of the reference to be impossible"
        else:
            text = f"the model's logits are NaN or infinite over the reference ({self._faults.cause()})"
        return GeneratedRow(request.position, (), text, "error", seconds, rows)

    def _losses(self, batch: Sequence[Request]) -> list[float]:
        return self._packed_losses(batch) if self._packs else self._padded_losses(batch)

    def _packed_losses(self, batch: Sequence[Request]) -> list[float]:
        """All tokens of the rows in one sequence, as many in a step as the engine takes of prompts."""
        losses = [0.0] * len(batch)
        cache = SlotCache(max_width=max(len(request.token_ids) for request in batch))
        step, kept = StepPlan(self._model.device, self._prefix.shared_row), list[tuple[int, range]]()
        for place, request in enumerate(batch):
            row = self._enter(request, cache)
            while row.missing:
                count = min(row.missing, self._stretch_tokens - len(step.input_ids))
                kept.append((place, step.score(row, count, self._starts[request.position] - 1)))
                if len(step.input_ids) == self._stretch_tokens:
                    self._add_losses(losses, batch, step, kept)
                    step, kept = StepPlan(self._model.device, self._prefix.shared_row), []
        if step.input_ids:
            self._add_losses(losses, batch, step, kept)
        return losses

    def _enter(self, request: Request, cache: SlotCache) -> Row:
        """Give the row a slot; nothing is predicted from its last token."""
        shared = self._prefix.attended_tokens
        read = replace(request, token_ids=request.token_ids[:-1])
        row = Row(read, None, time.perf_counter(), cached=shared, shared=shared)
        cache.add(row, row.missing)
        self._prefix.copy_to(row)
        return row

    def _add_losses(
        self, losses: list[float], batch: Sequence[Request], step: StepPlan, kept: Sequence[tuple[int, range]]
    ) -> None:
        """Run a step and add what each row loses in it; `kept` has the rows' places and tokens in its order."""
        import torch

        logits, begin = forward(self._model.model, self._model.device, step), 0
        for place, tokens in kept:
            if tokens:
                end, answer = begin + len(tokens), batch[place].token_ids[tokens.start + 1 : tokens.stop + 1]
                losses[place] += _loss(logits[begin:end], torch.tensor(answer, device=logits.device))
                begin = end

    def _padded_losses(self, batch: Sequence[Request]) -> list[float]:
        """Right-padded, so that plain causal attention needs no padding mask; the head runs on answers only."""
        import torch

        width = max(len(request.token_ids) for request in batch)
        input_ids = torch.zeros((len(batch), width), dtype=torch.long)
        for row, request in enumerate(batch):
            input_ids[row, : len(request.token_ids)] = torch.tensor(request.token_ids)
            # Its own token, not any: NaN of a broken one would reach the row through the mask.
            input_ids[row, len(request.token_ids) :] = request.token_ids[-1]
        device = self._model.device
        # Only positions from the first answer on need logits; rows are sorted by length, so little is wasted.
        first = min(self._starts[request.position] for request in batch) - 1
        keep = torch.arange(first, width, device=device)
        with torch.inference_mode():
            if self._independent_tokens is not None:  # a short pass takes back what a long row has set
                self._model.model(input_ids=input_ids[:, :1].to(device), use_cache=False)
            logits = self._model.model(
                input_ids=input_ids.to(device), use_cache=False, logits_to_keep=keep
            ).logits
        losses = []
        for row, request in enumerate(batch):
            start, end = self._starts[request.position], len(request.token_ids)
            answer = input_ids[row, start:end].to(device)
            losses.append(_loss(logits[row, start - 1 - first : end - 1 - first], answer))
        return losses


def _loss(logits: torch.Tensor, token_ids: torch.Tensor) -> float:
    """Negative log-likelihood of the tokens, [n], by logits of [n, vocabulary]."""
    from torch.nn import functional

    return float(functional.cross_entropy(logits.float(), token_ids, reduction="sum"))
