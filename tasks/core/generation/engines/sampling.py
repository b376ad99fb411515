"""Choosing the next token: greedy, or drawn from a stream of numbers that belongs to the row alone.

Each sampled row has its own stream, keyed by (seed, row id), and uses exactly one number a token. What is
drawn for a row therefore does not depend on batch size, order, shards, a crash or an out-of-memory retry.
The draw inverts the cumulative distribution, so its distribution is exactly the one the processors leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tasks.core.generation.engines.faults import marked
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch


# Logits divided by less than this may leave float32: they are taken relative to the row's largest.
_OVERFLOWING_TEMPERATURE = 1e-20


class RowStream:
    """Uniform numbers in [0, 1) for one row: number t belongs to the row's t-th new token."""

    __slots__ = ("_bits", "_block", "_used")
    _BLOCK = 64

    def __init__(self, seed: int, row_id: str) -> None:
        key = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=16).digest()
        self._bits = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        self._block: np.ndarray[tuple[int], np.dtype[np.float64]] = np.empty(0)
        self._used = 0

    def next(self) -> float:
        """Return the next number of the stream."""
        if self._used == len(self._block):
            self._block, self._used = self._bits.random(self._BLOCK), 0
        value = float(self._block[self._used])
        self._used += 1
        return value


class SeenTokens:
    """The different tokens of one row's prompt and answer so far; adding one costs the same at any length."""

    __slots__ = ("_count", "_ids", "_known")

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._known = set(token_ids)
        self._count = len(self._known)
        self._ids = np.fromiter(self._known, dtype=np.int64, count=self._count)

    def add(self, token_id: int) -> None:
        """Note the row's next token."""
        if token_id in self._known:
            return
        self._known.add(token_id)
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(max(64, self._count), dtype=np.int64)])
        self._ids[self._count] = token_id
        self._count += 1

    @property
    def ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The ids, in no order; a view that the next `add` may change."""
        return self._ids[: self._count]


class TokenChooser:
    """Applies transformers' own logits processors, in `generate`'s order, then picks one token a row."""

    def __init__(self, settings: GenerationSettings, eos_token_ids: Sequence[int]) -> None:
        from transformers.generation import logits_process as processors

        self.settings = settings
        self._eos = list(eos_token_ids)
        penalty = settings.repetition_penalty
        self._penalty = None
        if penalty is not None and penalty != 1.0:
            self._penalty = processors.RepetitionPenaltyLogitsProcessor(penalty=penalty)
        self._warpers: list[processors.LogitsProcessor] = []
        if settings.do_sample:
            if settings.temperature != 1.0:
                self._warpers.append(processors.TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self._warpers.append(processors.TopKLogitsWarper(top_k=settings.top_k))
            if settings.top_p is not None and settings.top_p < 1.0:
                self._warpers.append(processors.TopPLogitsWarper(top_p=settings.top_p))
            if settings.min_p:
                self._warpers.append(processors.MinPLogitsWarper(min_p=settings.min_p))

    def seen(self, token_ids: Iterable[int]) -> SeenTokens | None:
        """Return the memory of a row that begins with `token_ids`; None where no setting looks back."""
        return SeenTokens(token_ids) if self._penalty is not None else None

    def stream(self, row_id: str) -> RowStream | None:
        """Return the row's own stream of numbers, or None when decoding is greedy."""
        return RowStream(self.settings.seed, row_id) if self.settings.do_sample else None

    def choose(
        self,
        logits: torch.Tensor,
        streams: Sequence[RowStream | None],
        new_token_counts: Sequence[int],
        seen: Sequence[SeenTokens | None] = (),
    ) -> torch.Tensor:
        """Return one token id a row, int64 of shape [rows], from `logits` of shape [rows, vocabulary].

        A negative number says that the row's logits are no numbers and in which way, see faults.py. `new_token_counts`
        says how many tokens each row already has; `seen` is what `seen()` gave, with all tokens since. `logits` may be
        changed in place.
        """
        import torch

        early = self._early_rows(new_token_counts)
        plain = not early and self._penalty is None and not self.settings.do_sample
        if plain:
            chosen, largest = _likeliest(logits)
            return marked(chosen, largest)
        largest = logits.amax(dim=-1)  # before the settings rule tokens out
        if early:
            for token_id in self._eos:
                logits[early, token_id] = -float("inf")
        if self._penalty is not None:
            logits = logits.float()
            for row, tokens in enumerate(seen):
                if tokens is not None:
                    ids = torch.from_numpy(tokens.ids).to(logits.device)
                    logits[row] = self._penalty(ids.unsqueeze(0), logits[row : row + 1])[0]
        if not self.settings.do_sample:
            return marked(_likeliest(logits)[0], largest)
        scores = logits.float()
        if self.settings.temperature < _OVERFLOWING_TEMPERATURE:
            scores = scores - scores.amax(dim=-1, keepdim=True)
        nothing = torch.empty((scores.shape[0], 0), dtype=torch.long, device=scores.device)
        for warper in self._warpers:
            scores = warper(nothing, scores)
        numbers = [stream.next() for stream in streams if stream is not None]
        return marked(_invert(scores, numbers), largest)

    def _early_rows(self, new_token_counts: Sequence[int]) -> list[int]:
        """Rows whose answer is too short to end."""
        minimum = self.settings.min_new_tokens
        if minimum == 0 or not self._eos:
            return []
        return [row for row, count in enumerate(new_token_counts) if count < minimum]


def _likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token id of the largest logit of each row, and that logit; NaN counts as the largest."""
    if logits.device.type == "cpu":  # max is several times faster than argmax there in bfloat16
        largest, chosen = logits.max(dim=-1)
        return chosen, largest
    return logits.argmax(dim=-1), logits.amax(dim=-1)


def _invert(scores: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Smallest token id whose cumulative probability exceeds the row's number; scores are [rows, vocabulary]."""
    import torch

    # MPS refuses even to hold a tensor of doubles.
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    probabilities = scores.softmax(dim=-1, dtype=dtype)
    cumulative = probabilities.cumsum(dim=-1)
    targets = (torch.tensor(numbers, dtype=dtype, device=scores.device) * cumulative[:, -1]).unsqueeze(-1)
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # A number so near 1 that rounding carries it past the end falls on the last token that is possible at all.
    last_possible = scores.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.int8).argmax(dim=-1)
    return torch.minimum(chosen, last_possible)
