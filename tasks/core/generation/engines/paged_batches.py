"""The continuous engine: transformers' own continuous batching over a paged cache, sized by our budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.generation.engines.inflight_support import why_unsupported
from tasks.core.generation.stopping import StopRules
from tasks.core.memory.budget import TokenBudget
from tasks.core.memory.device_memory import is_out_of_memory
from tasks.core.models.tokenizing import eos_token_ids
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tasks.core.models.loading import LoadedModel

logger = logging.getLogger(__name__)

PAGE_TOKENS = 32
STEP_TOKENS = 512
RESULT_SECONDS = 1.0


class PagedBatchEngine:
    """transformers' `generate_batch` machinery, fed row by row; greedy decoding only.

    Its own default takes most of the memory for the cache; here the cache has as many pages as the budget has
    tokens. Source: https://huggingface.co/docs/transformers/continuous_batching.
    """

    name = "continuous"
    shares_steps = True
    exact_in_float32 = False

    def __init__(self, model: LoadedModel, settings: GenerationSettings) -> None:
        self._loaded = model
        self._model = model.model
        self._settings = settings
        self._pad_id = model.tokenizer.pad_token_id
        self._eos = eos_token_ids(model.model, model.tokenizer)
        self._stop = StopRules(model.tokenizer, self._eos, settings.stop_strings, settings.thought_markers)

    def unsupported(self) -> str | None:
        """Say which setting it does not cover; it draws from one stream for all rows, so never sampling."""
        settings = self._settings
        if settings.do_sample:
            return "sampling, whose draws would depend on the batch"
        if settings.num_beams > 1:
            return "beam search"
        if settings.min_new_tokens or settings.repetition_penalty not in (None, 1.0):
            return "min_new_tokens and repetition_penalty"
        if not hasattr(self._model, "continuous_batching_context_manager"):
            return f"{type(self._model).__name__} has no continuous batching"
        # It packs rows into one sequence too, and checks no model for whether that changes the answers.
        return why_unsupported(self._loaded, settings)

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        """Answer the queue; see Engine.generate.

        All rows of a step are one sequence here, of which NaN in one row reaches all. At the first logits that are no
        numbers the in-flight engine, in which rows are apart, goes on with what is left.
        """
        earlier = self._model.config._attn_implementation
        watch = _Watch()
        try:
            with watch.over(self._model):
                yield from self._generate(queue, budget, watch)
        finally:
            self._model.set_attn_implementation(earlier)
        if watch.faulty:
            logger.warning(
                "a row's logits are no numbers: the in-flight engine answers the rows that are left"
            )
            queue.restore()
            yield from InflightEngine(self._loaded, self._settings).generate(queue, budget)

    def _generate(self, queue: RequestQueue, budget: TokenBudget, watch: _Watch) -> Iterator[GeneratedRow]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        generation = GenerationConfig(
            max_new_tokens=self._settings.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._eos) or None,
            pad_token_id=self._pad_id,
        )
        pages = max(1, -(-max(budget.limit_tokens, queue.largest_room_tokens) // PAGE_TOKENS))
        longest = -(-queue.largest_room_tokens // PAGE_TOKENS)
        sizes = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=min(pages, budget.max_rows * (longest + 1)) + 1,
            max_batch_tokens=max(STEP_TOKENS, budget.max_rows),
            max_requests_per_batch=budget.max_rows,
            use_cuda_graph=False,
            seed=0,
        )
        flying: dict[str, tuple[Request, float]] = {}
        tokens = 0
        budget.admit(1, queue.largest_room_tokens)
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=sizes, block=True, warmup=False
        ) as manager:
            while queue or flying:
                while len(flying) < budget.max_rows and (request := queue.peek()) is not None:
                    if flying and tokens + request.room_tokens > budget.limit_tokens:
                        break
                    queue.take()
                    flying[request.id] = (request, time.perf_counter())
                    tokens += request.room_tokens
                    budget.admit(len(flying), tokens, queue.only_taken_id)
                    manager.add_request(
                        list(request.token_ids), request_id=request.id, max_new_tokens=request.max_new_tokens
                    )
                result = manager.get_result(timeout=RESULT_SECONDS)
                if watch.faulty:
                    return
                if result is None:
                    self._check(manager)
                    continue
                if not result.is_finished():
                    continue
                if result.error is not None:
                    raise RuntimeError(result.error)
                request, started = flying.pop(result.request_id)
                tokens -= request.room_tokens
                budget.clean_batch()
                queue.finish(request.position)
                yield self._row(request, result.generated_tokens, started, len(flying) + 1)

    @staticmethod
    def _check(manager: Any) -> None:
        """Raise what ended the manager's thread, if it has ended."""
        if manager.is_running():
            return
        error = manager.background_thread_status.fatal_error
        if isinstance(error, BaseException) and is_out_of_memory(error):
            raise error
        raise RuntimeError(f"transformers' continuous batching stopped: {error}")

    def _row(self, request: Request, generated: list[int], started: float, rows: int) -> GeneratedRow:
        kept, reason = self._stop.cut(generated, request.max_new_tokens, request.token_ids)
        seconds = time.perf_counter() - started
        return GeneratedRow(request.position, kept, self._stop.text(kept), reason, seconds, rows)


class _Watch:
    """Looks at the logits of each step, before a token is chosen from them."""

    def __init__(self) -> None:
        self.faulty = False
        """Whether some of them were no numbers; the step ended with an error then and gave no token."""

    @contextmanager
    def over(self, model: PreTrainedModel) -> Iterator[None]:
        """Look at all logits of `model` inside the block."""
        hook = model.register_forward_hook(self._look)
        try:
            yield
        finally:
            hook.remove()

    def _look(self, _module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        if not bool(output.logits.amax(dim=-1).isfinite().all()):
            self.faulty = True
            raise ArithmeticError("logits that are no numbers")
