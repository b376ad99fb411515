"""Choosing the next token: greedy, or drawn from a stream of numbers that belongs to the row alone.

Each sampled row has its own stream, keyed by (seed, row id), and uses exactly one number a token. What is
drawn for a row therefore does not depend on batch size, order, shards, a crash or an out-of-memory retry.
The draw inverts the cumulative distribution, so its distribution is exactly the one the processors leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch


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

    @property
    def needs_history(self) -> bool:
        """Whether `choose` must be given each row's tokens so far."""
        return self._penalty is not None

    def stream(self, row_id: str) -> RowStream | None:
        """Return the row's own stream of numbers, or None when decoding is greedy."""
        return RowStream(self.settings.seed, row_id) if self.settings.do_sample else None

    def choose(
        self,
        logits: torch.Tensor,
        streams: Sequence[RowStream | None],
        new_token_counts: Sequence[int],
        histories: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Return one token id a row, int64 of shape [rows], from `logits` of shape [rows, vocabulary].

        `new_token_counts` says how many tokens each row already has; `histories` holds prompt and new tokens
        of each row and is needed only when `needs_history`. `logits` may be changed in place.
        """
        import torch

        self._forbid_early_end(logits, new_token_counts)
        if self._penalty is not None and histories is not None:
            logits = logits.float()
            for row, history in enumerate(histories):
                tokens = torch.tensor([list(history)], device=logits.device)
                logits[row] = self._penalty(tokens, logits[row : row + 1])[0]
        if not self.settings.do_sample:
            # max is several times faster than argmax on CPU in bfloat16.
            return logits.max(dim=-1).indices if logits.device.type == "cpu" else logits.argmax(dim=-1)
        scores = logits.float()
        nothing = torch.empty((scores.shape[0], 0), dtype=torch.long, device=scores.device)
        for warper in self._warpers:
            scores = warper(nothing, scores)
        return _invert(scores, [stream.next() for stream in streams if stream is not None])

    def _forbid_early_end(self, logits: torch.Tensor, new_token_counts: Sequence[int]) -> None:
        minimum = self.settings.min_new_tokens
        if minimum == 0 or not self._eos:
            return
        early = [row for row, count in enumerate(new_token_counts) if count < minimum]
        if early:
            for token_id in self._eos:
                logits[early, token_id] = -float("inf")


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
