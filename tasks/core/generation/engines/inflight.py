"""The in-flight engine: finished rows leave at once, waiting rows take their place.

Each step is one forward pass over the newest token of every decoding row and, within a token allowance, over
stretches of the prompts of rows that enter. Nothing is padded. The prefix that all prompts share is computed
once; a short one is copied into each slot, a long one stays in one place that all rows attend to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.generation.engines.faults import Faults
from tasks.core.generation.engines.fused_layers import fused_layers
from tasks.core.generation.engines.inflight_support import why_unsupported
from tasks.core.generation.engines.lanes import Admission, Lane, lane_count, side_by_side
from tasks.core.generation.engines.packed_attention import (
    packed_attention,
)
from tasks.core.generation.engines.sampling import TokenChooser
from tasks.core.generation.engines.slots import Row, SlotCache
from tasks.core.generation.engines.step import StepPlan, forward
from tasks.core.generation.stopping import StopRules
from tasks.core.memory.budget import TokenBudget
from tasks.core.models.tokenizing import eos_token_ids
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch

    from tasks.core.models.loading import LoadedModel

# Prompt tokens that may enter in one step. Larger steps keep the linear layers busier, smaller ones keep
# intermediate results in the processor's cache; see docs/performance.md.
PREFILL_TOKENS_CPU = 1024
PREFILL_TOKENS_GPU = 8192
SMALLEST_SHARED_PREFIX = 16
# From here on reading a prefix once for all rows saves more than the additional products cost.
SMALLEST_ATTENDED_PREFIX = 128


class InflightEngine:
    """In-flight batching on an unmodified transformers decoder; see the module's docstring."""

    name = "inflight"
    shares_steps = True
    exact_in_float32 = True

    def __init__(self, model: LoadedModel, settings: GenerationSettings) -> None:
        self._model = model
        self._settings = settings
        self._eos = eos_token_ids(model.model, model.tokenizer)
        self._stop = StopRules(model.tokenizer, self._eos, settings.stop_strings, settings.thought_markers)
        self._faults = Faults(model)
        self._prefill_tokens = PREFILL_TOKENS_CPU if model.device == "cpu" else PREFILL_TOKENS_GPU

    def unsupported(self) -> str | None:
        """Say why the model or a setting needs `generate`, or None; tries a few tokens on the model."""
        return why_unsupported(self._model, self._settings)

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        """Answer the queue; see Engine.generate."""
        with packed_attention(self._model.model), fused_layers(self._model.model):
            prefix = Prefix.of(queue, self._model, budget, self._prefill_tokens)
            admission = Admission(queue, budget, self._lanes(queue, budget), prefix.attended_tokens)
            flights = [_Flight(self, lane, prefix, queue.largest_room_tokens).run for lane in admission.lanes]
            yield from side_by_side(flights, admission)

    def _lanes(self, queue: RequestQueue, budget: TokenBudget) -> int:
        if self._model.identity.quantization != "none":
            return 1  # layers of bitsandbytes keep notes about the call they are in
        if any(type(module).__name__ == "ParamWrapper" for module in self._model.model.modules()):
            return 1  # peft puts an adapter on experts by changing the module for the time of a call
        fitting_rows = budget.limit_tokens // max(1, queue.largest_room_tokens)
        return lane_count(self._model.device, min(len(queue), budget.max_rows), fitting_rows)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What all prompts begin with: copied into each slot or, when `attended`, read by all rows where it is."""

    row: Row | None = None
    attended: bool = False

    @classmethod
    def of(cls, queue: RequestQueue, model: LoadedModel, budget: TokenBudget, step_tokens: int) -> Prefix:
        """Compute the prefix that all prompts of the queue have in common, once; empty where nothing is gained."""
        token_ids = queue.shared_prefix
        if len(token_ids) < SMALLEST_SHARED_PREFIX or len(queue) < 2:
            return cls()
        row = Row(Request(-1, "prefix", token_ids, 0), None, time.perf_counter())
        budget.admit(1, len(token_ids))
        SlotCache(max_width=len(token_ids)).add(row, len(token_ids))
        while not row.prefilled:
            step = StepPlan(model.device)
            step.prefill(row, min(step_tokens, row.missing))
            step.choosing.clear()
            forward(model.model, model.device, step)
        return cls(row, attended=len(token_ids) >= SMALLEST_ATTENDED_PREFIX)

    def copy_to(self, row: Row) -> None:
        """Begin the row's slot with the prefix, if rows do not read it where it is."""
        if self.row is not None and not self.attended:
            row.copy_from(self.row)

    @property
    def shared_row(self) -> Row | None:
        """The row that all rows of a step read, or None."""
        return self.row if self.attended else None

    @property
    def tokens(self) -> int:
        return 0 if self.row is None else self.row.cached

    @property
    def attended_tokens(self) -> int:
        return self.tokens if self.attended else 0


class _Flight:
    """One lane of a session: the rows in flight in it and their slots."""

    def __init__(self, engine: InflightEngine, lane: Lane, prefix: Prefix, largest_room_tokens: int) -> None:
        self._model = engine._model.model
        self._device = engine._model.device
        self._stop, self._faults = engine._stop, engine._faults
        self._prefill_tokens = engine._prefill_tokens
        self._chooser = TokenChooser(engine._settings, engine._eos)
        self._lane, self._prefix = lane, prefix
        width, clears = max(1, largest_room_tokens), engine._model.identity.dtype == "float16"
        self._cache = SlotCache(max_width=width, clears=clears)
        # A prompt longer than one step's allowance waits here, apart from the rows that decode.
        self._entrance = SlotCache(max_width=width, clears=clears)
        self._entering: Row | None = None

    def run(self) -> Iterator[GeneratedRow]:
        """Step until no row waits or flies here, or the session is stopped."""
        while (self._lane.waiting or self._lane.rows) and not self._lane.stopped:
            step = StepPlan(self._device, self._prefix.shared_row)
            self._plan_decoding(step)
            self._plan_entering(step)
            flying = self._lane.step()
            logits = forward(self._model, self._device, step)
            if step.choosing:
                yield from self._advance(step.choosing, logits, flying)

    def _missing(self, request: Request) -> int:
        """Tokens of the prompt that must be computed."""
        return len(request.token_ids) - self._prefix.tokens

    def _plan_decoding(self, step: StepPlan) -> None:
        if self._entering is not None and self._entering.prefilled:
            self._cache.take_over(self._entering, self._entering.stored + 1)
            self._entering = None
        for pool in self._cache.pools:
            for row in list(pool.rows):
                if row is not None:
                    self._cache.make_room(row, row.stored + 1)
        for pool in self._cache.active():
            step.decode(pool)

    def _plan_entering(self, step: StepPlan) -> None:
        """Let rows enter while their prompts fit this step's allowance and the budget."""
        allowance = self._prefill_tokens
        if self._entering is not None:
            allowance -= step.prefill(self._entering, min(allowance, self._entering.missing))

        def fits(request: Request) -> bool:
            return allowance == self._prefill_tokens or self._missing(request) <= allowance

        while self._entering is None:
            request = self._lane.take(fits)
            if request is None:
                return
            missing = self._missing(request)
            row = self._enter(request, missing > allowance)
            allowance -= step.prefill(row, min(allowance, missing))

    def _enter(self, request: Request, in_stretches: bool) -> Row:
        shared = self._prefix.attended_tokens
        row = Row(
            request,
            self._chooser.stream(request.id),
            time.perf_counter(),
            cached=shared,
            shared=shared,
            seen=self._chooser.seen(request.token_ids),
        )
        prompt_tokens = len(request.token_ids) - shared
        if in_stretches:
            self._entering = row
            self._entrance.add(row, prompt_tokens)
        else:  # room for the first tokens of the answer too, so that a row rarely moves early
            self._cache.add(row, min(request.room_tokens - shared, prompt_tokens + 32))
        self._prefix.copy_to(row)
        return row

    def _advance(self, rows: list[Row], logits: torch.Tensor, flying: int) -> Iterator[GeneratedRow]:
        """Choose each row's next token; rows that end leave their slot and are yielded."""
        import torch

        counts = [len(row.new_tokens) for row in rows]
        with torch.inference_mode():
            streams, seen = [row.stream for row in rows], [row.seen for row in rows]
            chosen = self._chooser.choose(logits, streams, counts, seen).tolist()
        for row, token_id in zip(rows, chosen, strict=True):
            if token_id < 0:
                self._leave(row, flying, clear=True)
                seconds = time.perf_counter() - row.started_seconds
                yield self._faults.row(row.request, token_id, len(row.new_tokens) + 1, seconds, flying)
                continue
            row.new_tokens.append(token_id)
            if row.seen is not None:
                row.seen.add(token_id)
            reason = self._stop.finished(row.new_tokens, row.request.max_new_tokens, row.request.token_ids)
            if reason is None:
                continue
            self._leave(row, flying)
            yield GeneratedRow(
                row.request.position,
                tuple(row.new_tokens),
                self._stop.text(row.new_tokens),
                reason,
                time.perf_counter() - row.started_seconds,
                flying,
            )

    def _leave(self, row: Row, flying: int, *, clear: bool = False) -> None:
        self._cache.remove(row, clear=clear)
        if row is self._entering:  # its first token was its last
            self._entering = None
        self._lane.leave(row.request, flying)
