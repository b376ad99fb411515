"""How likely the model finds the reference answers: their negative log-likelihood, and perplexity."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.budget import TokenBudget
from tasks.core.generation.engine import GeneratedRow
from tasks.core.generation.ladder import generate_all
from tasks.core.generation.ledger import ABSENT, Mask, index_ledgers, read_lines, storage_error
from tasks.core.generation.rows import RunRows
from tasks.core.records import Example

if TYPE_CHECKING:
    import torch

    from tasks.core.data.prompts import PromptBuilder, TrainingRow
    from tasks.core.models.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class ReferenceScore:
    """exp(total negative log-likelihood / tokens) over all references that fit; see `score_references`."""

    perplexity: float | None
    tokens: int
    rows: int


def score_references(
    path: Path,
    rows: RunRows,
    *,
    model: LoadedModel,
    prompts: PromptBuilder,
    budget: TokenBudget,
    wanted: Mask | None = None,
) -> ReferenceScore:
    """Write one line {id, tokens, negative_log_likelihood} per reference to `path` and return the total.

    Teacher-forced: each reference token (with the end token that a right answer carries) is scored given the
    prompt and the reference before it; natural logarithm. Rows without a reference are left out. Perplexity
    as in Jelinek et al. 1977, per token of this model's tokenizer, so comparable only between models that
    share it. With `wanted`, a mask by position, only those rows are scored.
    """
    answers: dict[int, int] = {}
    requests: dict[int, Request] = {}
    total, tokens, count = 0.0, 0, 0
    scratch_path = path.with_suffix(".tmp")
    try:
        with scratch_path.open("wb") as file:
            for chunk in _chunks(rows, prompts, wanted):
                requests = {request.position: request for request, _ in chunk}
                answers = {request.position: start for request, start in chunk}
                lengths = [len(request.token_ids) for request in requests.values()]
                queue = RequestQueue(list(requests), lengths, requests.__getitem__)
                scorer = _ReferenceScorer(model, answers)
                for row in generate_all(scorer, queue, budget, device=model.device):
                    if row.finish_reason == "error":
                        continue
                    loss = float(row.text)
                    answer_tokens = len(requests[row.position].token_ids) - answers[row.position]
                    total, tokens, count = total + loss, tokens + answer_tokens, count + 1
                    line = {"id": rows.ids[row.position].decode(), "tokens": answer_tokens}
                    file.write(orjson.dumps({**line, "negative_log_likelihood": loss}) + b"\n")
        scratch_path.replace(path)
    except OSError as exc:
        scratch_path.unlink(missing_ok=True)
        raise storage_error(exc, path) from exc
    return ReferenceScore(math.exp(total / tokens) if tokens else None, tokens, count)


def read_reference_score(path: Path) -> ReferenceScore:
    """Sum up a file that `score_references` wrote whole. Raises FileNotFoundError when it did not."""
    total, tokens, count = 0.0, 0, 0
    with path.open("rb") as file:
        for line in file:
            row = orjson.loads(line)
            total, tokens, count = total + row["negative_log_likelihood"], tokens + row["tokens"], count + 1
    return ReferenceScore(math.exp(total / tokens) if tokens else None, tokens, count)


def merge_references(path: Path, parts: Sequence[Path], rows: RunRows) -> ReferenceScore:
    """Join the files of all shards into `path`, in dataset order, and return the total."""
    index = index_ledgers(parts, rows.ids)
    scored = index.offsets != ABSENT
    scratch_path = path.with_suffix(".tmp")
    try:
        with scratch_path.open("wb") as file:
            file.writelines(read_lines(index.only(scored)))
        scratch_path.replace(path)
    except OSError as exc:
        scratch_path.unlink(missing_ok=True)
        raise storage_error(exc, path) from exc
    return read_reference_score(path)


def _chunks(
    rows: RunRows, prompts: PromptBuilder, wanted: Mask | None, size: int = 4096
) -> Iterator[list[tuple[Request, int]]]:
    chunk: list[tuple[Request, int]] = []
    positions: deque[int] = deque()

    def scorable() -> Iterator[Example]:
        for position, example in enumerate(rows.examples()):
            if wanted is not None and not wanted[position]:
                continue
            if example.problem is None and example.reference is not None:
                positions.append(position)
                yield example

    for row in prompts.training_rows(scorable()):
        position = positions.popleft()
        start, end = _answer_span(row)
        if row.problem is None and end > start > 0:
            chunk.append((Request(position, row.id, tuple(row.input_ids[:end]), 0), start))
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _answer_span(row: TrainingRow) -> tuple[int, int]:
    """Begin and end of the last labelled stretch: the reference, not earlier turns of the conversation."""
    labelled = [place for place, label in enumerate(row.labels) if label != -100]
    if not labelled:
        return 0, 0
    end = labelled[-1] + 1
    start = labelled[-1]
    while start > 0 and row.labels[start - 1] != -100:
        start -= 1
    return start, end


class _ReferenceScorer:
    """An engine that generates nothing: each row's text is the negative log-likelihood of its reference."""

    name = "reference_scorer"

    def __init__(self, model: LoadedModel, answer_starts: dict[int, int]) -> None:
        self._model = model
        self._starts = answer_starts

    def unsupported(self) -> str | None:
        return None

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        while queue:
            # Activations of a whole forward pass are larger than a cache entry, so a quarter of the budget.
            batch = queue.take_batch(min(8192, max(1, budget.limit_tokens // 4)), budget.max_rows)
            budget.admit(len(batch), sum(request.room_tokens for request in batch), queue.only_taken_id)
            started = time.perf_counter()
            losses = self._losses(batch)
            budget.clean_batch()
            seconds = time.perf_counter() - started
            for request, loss in zip(batch, losses, strict=True):
                queue.finish(request.position)
                yield GeneratedRow(request.position, (), repr(loss), "stop", seconds, len(batch))

    def _losses(self, batch: Sequence[Request]) -> list[float]:
        """Right-padded, so that plain causal attention needs no padding mask; the head runs on answers only."""
        import torch

        width = max(len(request.token_ids) for request in batch)
        input_ids = torch.zeros((len(batch), width), dtype=torch.long)
        for row, request in enumerate(batch):
            input_ids[row, : len(request.token_ids)] = torch.tensor(request.token_ids)
        device = self._model.device
        # Only positions from the first answer on need logits; rows are sorted by length, so little is wasted.
        first = min(self._starts[request.position] for request in batch) - 1
        keep = torch.arange(first, width, device=device)
        with torch.inference_mode():
            logits = self._model.model(
                input_ids=input_ids.to(device), use_cache=False, logits_to_keep=keep
            ).logits
            return [
                self._loss(logits[row], request, first, input_ids[row].to(device))
                for row, request in enumerate(batch)
            ]

    def _loss(self, logits: torch.Tensor, request: Request, first: int, input_ids: torch.Tensor) -> float:
        from torch.nn import functional

        start, end = self._starts[request.position], len(request.token_ids)
        scores = logits[start - 1 - first : end - 1 - first].float()
        return float(functional.cross_entropy(scores, input_ids[start:end], reduction="sum"))
