"""One run from prompts to ledger: what is missing is answered, what is there is kept."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from tasks.core.generation.batching import RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.generation.engines.choosing import EngineChoice
from tasks.core.generation.engines.inflight import PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU
from tasks.core.generation.engines.lanes import lane_count
from tasks.core.generation.ladder import generate_all
from tasks.core.generation.prompt_store import PromptStore, Repeats
from tasks.core.memory.activations import activation_bytes
from tasks.core.memory.budget import BudgetStore, LearnedBudget, TokenBudget
from tasks.core.memory.device_memory import cache_bytes_per_token, free_bytes, peak_bytes, total_bytes
from tasks.core.prompts.answer_reading import AnswerReader, ReadAnswer
from tasks.core.provenance import library_version, now
from tasks.core.records import Completion, Example, GenerationSettings, Prompt
from tasks.core.runs.ledger import ABSENT, Ledger, LedgerIndex, Mask, count_lines, index_ledgers
from tasks.core.runs.progress import GenerationProgress, ProgressMeter
from tasks.core.runs.rows import RunRows
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import Session, count_out_of_memory, recorded
from tasks.core.runs.shards import Shard

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel
    from tasks.core.prompts.tokens import PromptBuilder

logger = logging.getLogger(__name__)

DEFAULT_MAX_ROWS_CPU = 64
DEFAULT_MAX_ROWS_GPU = 256
# Share that the cache may take of the memory that a step's activations leave; slots that grow are there twice.
CACHE_SHARE = 0.5
SMALLEST_LIMIT_TOKENS = 256


def starting_budget(
    model: LoadedModel,
    *,
    batch_size: int | None,
    max_batch_tokens: int | None,
    store: BudgetStore | None = None,
    processes: int = 1,
) -> TokenBudget:
    """Return the budget to begin with: what memory should hold, or less if the last run learned so.

    That is half of what a step's activations leave of the free memory, by the cache's bytes for one token.
    `processes` of them share the memory of the device.
    """
    on_cpu = model.device == "cpu"
    max_rows = batch_size or (DEFAULT_MAX_ROWS_CPU if on_cpu else DEFAULT_MAX_ROWS_GPU)
    if max_batch_tokens is not None:
        limit_tokens = max_batch_tokens
    else:
        prefill_tokens = PREFILL_TOKENS_CPU if on_cpu else PREFILL_TOKENS_GPU
        step_tokens = max_rows + lane_count(model.device, max_rows) * prefill_tokens
        step = activation_bytes(model.model, model.device, tokens=step_tokens, rows=max_rows)
        room = (free_bytes(model.device) / processes - step) * CACHE_SHARE
        per_token = max(1, cache_bytes_per_token(model.model))
        limit_tokens = max(SMALLEST_LIMIT_TOKENS, int(room // per_token))
    learned = store.load(budget_key(model)) if store is not None else None
    if learned is not None and learned.limit_tokens < limit_tokens:
        logger.info("memory: starts at %d tokens, learned from an earlier run", learned.limit_tokens)
    return TokenBudget(limit_tokens, max_rows, learned)


def remember_budget(model: LoadedModel, budget: TokenBudget, store: BudgetStore) -> None:
    """Keep what this run learned about memory for the next one."""
    learned: LearnedBudget | None = budget.learned()
    if learned is not None:
        store.save(budget_key(model), learned)


def budget_key(model: LoadedModel) -> str:
    """Shape of the model, dtype, quantisation, device, its memory in GiB, and the versions that decide what fits.

    Not its weights: the next fine-tuned model of the same base has the same shape and uses what this one learned.
    """
    shapes = [(name, tuple(value.shape)) for name, value in model.model.named_parameters()]
    digest = hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:12]
    shape = f"{type(model.model).__name__} {digest}"
    identity = model.identity
    memory_gib = round(total_bytes(model.device) / 2**30, 1)
    versions = f"torch{library_version('torch')} transformers{library_version('transformers')}"
    return f"{shape} {identity.dtype} {identity.quantization} {model.device} {memory_gib}GiB {versions}"


def index_run(run: RunDir, rows: RunRows) -> LedgerIndex:
    """Find the line of each row in all ledgers of a run: its own and those of its shards."""
    return index_ledgers(run.ledger_paths(), rows.ids, run.run_key)


def missing_mask(run: RunDir, rows: RunRows, shard: Shard | None = None) -> Mask:
    """Tell for each row whether it is of this shard (None: of the run) and in no ledger of the run."""
    missing: Mask = index_run(run, rows).offsets == ABSENT
    return missing if shard is None else missing & shard.mask(rows.ids)


def answer_missing(
    run: RunDir,
    rows: RunRows,
    *,
    prompts: PromptBuilder,
    choice: EngineChoice,
    budget: TokenBudget,
    settings: GenerationSettings,
    device: str,
    report: Callable[[GenerationProgress], None] | None = None,
    shard: Shard | None = None,
    reader: AnswerReader | None = None,
) -> LedgerIndex:
    """Answer every row (of the shard) that no ledger of the run has; return where each row's line is.

    `reader` splits thoughts from answers; without one, answers stay as the engine gives them.

    The caller holds the lock of `run`, or of the shard's directory, and has claimed `run`. Whatever ends this
    early, the rows finished until then are in the ledger, and calling it again goes on from there.
    """
    part = run if shard is None else run.shard(shard)
    work = _Work(part, shard, choice, budget, device)
    with Ledger(part.ledger_path, run.run_key) as ledger:
        before = index_run(run, rows)
        own = np.ones(len(rows), dtype=np.bool_) if shard is None else shard.mask(rows.ids)
        missing = own & (before.offsets == ABSENT)
        _tell_what_is_there(int(missing.sum()), int(own.sum()))
        parts = run.parts() if shard is None else [part]
        meter = _meter(before, own, parts, budget, report)
        completions = _completions(part, rows, missing, prompts, choice, budget, settings, device, reader)
        try:
            with recorded(part, work.session) if missing.any() else nullcontext():
                for completion in completions:
                    ledger.append(completion)
                    work.answered += 1
                    meter.add(
                        completion.completion_tokens,
                        completion.batch_size,
                        error=completion.error is not None,
                    )
                ledger.sync()
        finally:
            meter.report_now()
    return index_run(run, rows)


class _Work:
    """What one session does: which part, with what, since when, and how many rows are answered."""

    def __init__(
        self, part: RunDir, shard: Shard | None, choice: EngineChoice, budget: TokenBudget, device: str
    ) -> None:
        self._shard, self._choice, self._budget, self._device = shard, choice, budget, device
        self._started, self._started_at = time.monotonic(), now("milliseconds")
        self._rows_before = count_lines(part.ledger_path)
        self.answered = 0

    def session(self) -> Session:
        """Return how far it is."""
        return Session(
            engine=self._choice.engine.name,
            engine_reason=self._choice.reason,
            shard=None if self._shard is None else self._shard.name,
            host=socket.gethostname(),
            started_at=self._started_at,
            seconds=time.monotonic() - self._started,
            rows=self.answered,
            memory_events=tuple(self._budget.events),
            peak_memory_bytes=peak_bytes(self._device),
            limit_tokens=self._budget.limit_tokens,
            device=self._device,
            rows_before=self._rows_before,
        )


def _tell_what_is_there(missing: int, total: int) -> None:
    if 0 < missing < total:
        logger.info("%d of %d rows are answered already; the others follow", total - missing, total)


def _meter(
    before: LedgerIndex,
    own: Mask,
    parts: Sequence[RunDir],
    budget: TokenBudget,
    report: Callable[[GenerationProgress], None] | None,
) -> ProgressMeter:
    """Return a meter over the `own` rows that goes on from what earlier sessions did, `before`."""
    done = own & (before.offsets != ABSENT)
    return ProgressMeter(
        int(own.sum()),
        int(done.sum()),
        budget,
        report,
        error_rows=int((own & before.failed).sum()),
        out_of_memory_count=count_out_of_memory(parts),
    )


def _completions(
    part: RunDir,
    rows: RunRows,
    missing: Mask,
    prompts: PromptBuilder,
    choice: EngineChoice,
    budget: TokenBudget,
    settings: GenerationSettings,
    device: str,
    reader: AnswerReader | None,
) -> Iterator[Completion]:
    if not missing.any():
        return
    store = PromptStore(part.prompts_path)
    unanswerable: list[tuple[int, str]] = []
    try:
        store.write(_prompts(rows, missing, prompts, unanswerable))
        _warn_of_cut_prompts(store)
        for position, problem in unanswerable:
            yield _problem(rows, position, problem)
        positions, repeats = store.positions, Repeats.none()
        if not settings.do_sample:  # equal greedy prompts have equal answers: compute one, write all
            positions, repeats = store.first_of_equals()
        lengths = store.lengths[np.searchsorted(store.positions, positions)]
        queue = RequestQueue(
            positions,
            lengths,
            lambda position: store.request(position, rows.ids, settings.max_new_tokens),
            shared_prefix=store.shared_prefix,
            largest_answer_tokens=settings.max_new_tokens,
        )
        for row in generate_all(choice.engine, queue, budget, device=device):
            answer = _read(reader, row, store)
            for position in (row.position, *repeats.of(row.position)):
                yield _completion(rows, store, row, answer, position)
    finally:
        store.remove()


def _warn_of_cut_prompts(store: PromptStore) -> None:
    count, most_tokens = store.cut
    if count:
        logger.warning(
            "%d of %d prompts were cut on the left by up to %d tokens: with the answer they are longer than the "
            "model or max_sequence_length allows",
            *(count, len(store), most_tokens),
        )


def _prompts(
    rows: RunRows, wanted: Mask, prompts: PromptBuilder, unanswerable: list[tuple[int, str]]
) -> Iterator[tuple[int, Prompt]]:
    """Yield the prompts of the wanted rows; rows that have none go to `unanswerable` with the reason."""
    positions: deque[int] = deque()

    def askable() -> Iterator[Example]:
        for position, example in enumerate(rows.examples()):
            if wanted[position]:
                if example.problem is not None:
                    unanswerable.append((position, example.problem))
                else:
                    positions.append(position)
                    yield example

    for prompt in prompts.build_all(askable()):
        position = positions.popleft()
        if prompt.problem is not None:
            unanswerable.append((position, prompt.problem))
        else:
            yield position, prompt


def _problem(rows: RunRows, position: int, problem: str) -> Completion:
    row_id = rows.ids[position].decode()
    return Completion(row_id, "", "error", 0, 0, 0.0, 0, error=problem)


def _read(reader: AnswerReader | None, row: GeneratedRow, store: PromptStore) -> ReadAnswer:
    if row.finish_reason == "error":
        return ReadAnswer("")
    if reader is None:
        return ReadAnswer(row.text)
    return reader.read(row.text, row.token_ids, store.token_ids(row.position))


def _completion(
    rows: RunRows, store: PromptStore, row: GeneratedRow, answer: ReadAnswer, position: int
) -> Completion:
    return Completion(
        id=rows.ids[position].decode(),
        text=answer.text,
        finish_reason=row.finish_reason,
        prompt_tokens=store.length(position),
        completion_tokens=len(row.token_ids),
        seconds=round(row.seconds, 4),
        batch_size=row.batch_size,
        truncated_tokens=store.truncated_tokens(position),
        error=row.text if row.finish_reason == "error" else None,
        reasoning=answer.reasoning,
        reasoning_tokens=answer.reasoning_tokens,
        is_cut_in_thoughts=answer.is_cut_in_thoughts,
    )
