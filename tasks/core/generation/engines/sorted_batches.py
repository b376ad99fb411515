"""The plain engine: batches of similar length through transformers' own `generate`."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tasks.core.errors import NoAnswerError
from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.generation.engines.faults import Faults, marked
from tasks.core.generation.engines.rotary import independent_tokens
from tasks.core.generation.engines.sampling import TokenChooser
from tasks.core.generation.stopping import StopRules
from tasks.core.memory.budget import TokenBudget
from tasks.core.models.tokenizing import eos_token_ids
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch

    from tasks.core.models.loading import LoadedModel


class SortedBatchEngine:
    """Left-padded batches, longest prompts first; covers every model and setting that `generate` covers.

    Sampling uses the rows' own streams (see sampling.py): `generate` runs greedily over scores of which
    only the drawn token is left. Beam search uses `generate`'s own.
    """

    name = "generate"
    shares_steps = False  # it keeps rows apart whose positions depend on each other, by `alone_beyond_tokens`
    exact_in_float32 = False

    def __init__(self, model: LoadedModel, settings: GenerationSettings) -> None:
        self._model = model.model
        self._tokenizer = model.tokenizer
        self._device = model.device
        self._settings = settings
        self._eos = eos_token_ids(model.model, model.tokenizer)
        self._stop = StopRules(model.tokenizer, self._eos, settings.stop_strings, settings.thought_markers)
        self._faults = Faults(model)
        self._independent_tokens = independent_tokens(model.model)

    def unsupported(self) -> str | None:
        """Nothing is: this engine is the fallback of the others."""
        return None

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        """Answer the queue batch by batch; see Engine.generate."""
        beams = self._settings.num_beams
        max_rows = 1 if beams > 1 and self._settings.do_sample else budget.max_rows
        while queue:
            batch = queue.take_batch(
                budget.limit_tokens // beams, max_rows, alone_beyond_tokens=self._independent_tokens
            )
            width = max(len(request.token_ids) for request in batch)
            room = width + max(request.max_new_tokens for request in batch)
            budget.admit(len(batch), len(batch) * room * beams, queue.only_taken_id)
            started = time.perf_counter()
            answers, faults = self._answer(batch, width)
            seconds = time.perf_counter() - started
            budget.clean_batch()
            for request, token_ids, fault in zip(batch, answers, faults, strict=True):
                queue.finish(request.position)
                yield self._row(request, token_ids, fault, seconds, len(batch))

    def _row(
        self, request: Request, token_ids: list[int], fault: tuple[int, int], seconds: float, rows: int
    ) -> GeneratedRow:
        kept, reason = self._stop.cut(token_ids, request.max_new_tokens, request.token_ids)
        mark, token = fault
        # A row that has ended goes on with padding while others answer, and what comes of that is nobody's answer.
        if mark and (token <= len(kept) or self._settings.num_beams > 1):
            return self._faults.row(request, mark, token, seconds, rows)
        return GeneratedRow(
            request.position, kept, self._stop.text(kept), reason, seconds, batch_size=rows
        )  # fmt: skip

    def stream(self, request: Request, streamer: Any, cancelled: threading.Event) -> None:
        """Answer one request, feeding `streamer`; setting `cancelled` ends it at the next token.

        Raises NoAnswerError where the logits become no numbers.
        """

        def is_cancelled(input_ids: torch.Tensor, _scores: object, **_unused: object) -> torch.Tensor:
            import torch

            return torch.full((input_ids.shape[0],), cancelled.is_set(), device=input_ids.device)

        width = len(request.token_ids)
        answers, faults = self._answer([request], width, streamer=streamer, criteria=[is_cancelled])
        row = self._row(request, answers[0], faults[0], 0.0, 1)
        if row.finish_reason == "error":
            raise NoAnswerError(f"there is no answer: {row.text}", "answer with another model or dtype")

    def _answer(
        self, batch: Sequence[Request], width: int, *, criteria: Sequence[Any] = (), **streaming: Any
    ) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Return each row's new tokens, and the mark and new token number of its first fault, (0, 0) without one."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        pad = self._tokenizer.pad_token_id
        input_ids, attention_mask = _left_padded(batch, width)
        settings = self._settings
        beams = settings.num_beams > 1
        config = GenerationConfig(
            max_new_tokens=max(request.max_new_tokens for request in batch),
            min_new_tokens=(settings.min_new_tokens or None) if beams else None,
            do_sample=False,
            num_beams=settings.num_beams,
            pad_token_id=pad,
            eos_token_id=list(self._eos) or None,
            use_cache=True,
            return_dict_in_generate=False,
        )
        record = _FaultRecord(len(batch), width, settings.num_beams, self._eos)
        processors, stopping = LogitsProcessorList([record]), StoppingCriteriaList([*criteria, record.ended])
        if beams:
            self._configure_beams(config, batch)
        else:
            processors.extend(self._processors(batch, width))
        if settings.stop_strings:
            stopping.append(_StopStringInAnswer(self._stop, width))
        with torch.inference_mode():
            if self._independent_tokens is not None:  # a short pass takes back what a long row has set
                self._model(input_ids=input_ids[:, :1].to(self._device), use_cache=False)
            output = self._model.generate(
                input_ids=input_ids.to(self._device),
                attention_mask=attention_mask.to(self._device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=stopping,
                **streaming,
            )
        return [list(map(int, row)) for row in output[:, width:].tolist()], record.faults()

    def _processors(self, batch: Sequence[Request], width: int) -> list[Any]:
        """Logits processors that leave the tokens which `generate`, itself greedy, may take: here one a row."""
        return [_ChosenTokenOnly(self._settings, self._eos, batch, width)]

    def _configure_beams(self, config: Any, batch: Sequence[Request]) -> None:
        import torch

        settings = self._settings
        config.length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        config.early_stopping = settings.early_stopping
        config.repetition_penalty = settings.repetition_penalty
        if settings.do_sample:  # one row a batch, seeded by the row: independent of everything around it
            config.do_sample, config.temperature = True, settings.temperature
            config.top_k, config.top_p, config.min_p = settings.top_k, settings.top_p, settings.min_p
            seed = hashlib.blake2b(f"{settings.seed}:{batch[0].id}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(seed, "little") % (1 << 63))


def _left_padded(batch: Sequence[Request], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and their mask, int64 [rows, width] each.

    A row is filled up with its own first token, not the model's padding token: should the weights of that be NaN, it
    would reach the row through its mask.
    """
    import torch

    input_ids = torch.zeros((len(batch), width), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, request in enumerate(batch):
        start = width - len(request.token_ids)
        input_ids[row, :start] = request.token_ids[0]
        input_ids[row, start:] = torch.tensor(request.token_ids)
        attention_mask[row, start:] = 1
    return input_ids, attention_mask


class _FaultRecord:
    """A logits processor, the first: notes rows whose logits are no numbers, and puts numbers in their place.

    `ended` is a stopping criterion that ends these rows.
    """

    def __init__(self, rows: int, width: int, beams: int, eos: Sequence[int]) -> None:
        self._width, self._beams, self._eos = width, beams, list(eos)
        self._faults = [(0, 0)] * rows

    def faults(self) -> list[tuple[int, int]]:
        """Mark (see faults.py) and new token number, from 1, of each row's first fault; (0, 0) without one."""
        return self._faults

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        largest = scores.amax(dim=-1)
        marks = marked(torch.zeros(largest.shape, dtype=torch.long, device=scores.device), largest).tolist()
        if not any(marks):
            return scores
        for place, mark in enumerate(marks):
            row = place // self._beams
            if mark and not self._faults[row][0]:
                self._faults[row] = (mark, input_ids.shape[1] - self._width + 1)
        places = [place for place, mark in enumerate(marks) if mark]
        # Nothing is streamed of an end token. Beams need more than one token that is possible.
        only_end = self._beams == 1 and bool(self._eos)
        scores = scores.clone()
        scores[places] = -float("inf") if only_end else 0.0
        if only_end:
            scores[places, self._eos[0]] = 0.0
        return scores

    def ended(self, input_ids: torch.Tensor, _scores: object, **_unused: object) -> torch.Tensor:
        """Whether each row is faulty; beam search asks for several candidates of a row at once."""
        import torch

        candidates = input_ids.shape[0] // len(self._faults)
        faulty = [bool(mark) for mark, _ in self._faults for _ in range(candidates)]
        return torch.tensor(faulty, device=input_ids.device)


class _StopStringInAnswer:
    """A stopping criterion of transformers by our own rules: theirs look into the prompt's end as well."""

    def __init__(self, stop: StopRules, width: int) -> None:
        self._stop, self._width = stop, width

    def __call__(self, input_ids: torch.Tensor, _scores: object, **_unused: object) -> torch.Tensor:
        import torch

        # The answers' ends first: what comes before has been looked at.
        start = max(self._width, input_ids.shape[1] - self._stop.window_tokens)
        ended = [
            self._stop.may_end(tail)
            and self._stop.ends_with_stop_string(row[self._width :].tolist(), row[: self._width].tolist())
            for row, tail in zip(input_ids, input_ids[:, start:].tolist(), strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


class _ChosenTokenOnly:
    """A logits processor that leaves one token a row: the one our own chooser picked."""

    def __init__(
        self, settings: GenerationSettings, eos: Sequence[int], batch: Sequence[Request], width: int
    ) -> None:
        self._chooser = TokenChooser(settings, eos)
        self._streams = [self._chooser.stream(request.id) for request in batch]
        self._seen = [self._chooser.seen(request.token_ids) for request in batch]
        self._width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        new_tokens = input_ids.shape[1] - self._width
        if new_tokens and self._seen[0] is not None:
            for seen, token_id in zip(self._seen, input_ids[:, -1].tolist(), strict=True):
                assert seen is not None
                seen.add(token_id)
        chosen = self._chooser.choose(scores, self._streams, [new_tokens] * len(self._streams), self._seen)
        only = torch.full_like(scores, -float("inf"))
        # A row that is known to be faulty may have no possible token: any will do.
        return only.scatter_(1, chosen.clamp(min=0).unsqueeze(1), 0.0)
