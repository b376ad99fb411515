"""Prompts on disk: tokenised once, read back one at a time, so that memory does not grow with their length."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.core.files import storage_error
from tasks.core.generation.batching import Request
from tasks.core.records import Prompt
from tasks.core.runs.ledger import ROWS_KEPT, Ids

TOKEN_BYTES = 4
Positions = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows with the prompt of an earlier row: pairs of dataset positions, 16 bytes each, sorted by the earlier."""

    firsts: Positions
    repeats: Positions

    @classmethod
    def none(cls) -> Repeats:
        """No row repeats another."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def of(self, first: int) -> list[int]:
        """Positions of the rows that repeat the one at position `first`, ascending."""
        start, end = np.searchsorted(self.firsts, (first, first + 1))
        positions: list[int] = self.repeats[start:end].tolist()
        return positions


class PromptStore:
    """Token ids of all prompts to answer, in a scratch file; about 30 bytes a row stay in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._positions = array("q")
        self._starts = array("q", [0])
        self._truncated = array("i")
        self._digests = array("q")
        self._prefix: np.ndarray[tuple[int], np.dtype[np.int32]] | None = None
        self._descriptor = -1

    def write(self, prompts: Iterable[tuple[int, Prompt]]) -> None:
        """Write all (position, prompt) pairs; positions must ascend."""
        start = 0
        try:
            with self.path.open("wb") as file:
                for position, prompt in prompts:
                    tokens = np.asarray(prompt.token_ids, dtype=np.int32)
                    file.write(tokens.tobytes())
                    start += len(tokens)
                    self._positions.append(position)
                    self._starts.append(start)
                    self._truncated.append(prompt.truncated_tokens)
                    self._digests.append(hash(tokens.tobytes()))
                    self._shorten_prefix(tokens)
        except OSError as exc:
            raise storage_error(exc, self.path, ROWS_KEPT) from exc
        self._descriptor = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def positions(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Dataset positions of the stored prompts, ascending."""
        return np.frombuffer(self._positions, dtype=np.int64) if len(self) else np.empty(0, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Prompt lengths in tokens, in the order of `positions`."""
        return np.diff(np.frombuffer(self._starts, dtype=np.int64)).astype(np.int32)

    @property
    def cut(self) -> tuple[int, int]:
        """How many prompts were cut, and the most tokens that one of them lost."""
        return sum(tokens > 0 for tokens in self._truncated), max(self._truncated, default=0)

    def truncated_tokens(self, position: int) -> int:
        """Tokens that were cut from the prompt at `position`."""
        return self._truncated[self._slot(position)]

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        """Tokens that all prompts begin with; each prompt has at least one more."""
        return () if self._prefix is None else tuple(self._prefix.tolist())

    def token_ids(self, position: int) -> tuple[int, ...]:
        """Token ids of the prompt at dataset `position`."""
        slot = self._slot(position)
        start, end = self._starts[slot] * TOKEN_BYTES, self._starts[slot + 1] * TOKEN_BYTES
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        return tuple(np.frombuffer(os.pread(self._descriptor, end - start, start), dtype=np.int32).tolist())

    def length(self, position: int) -> int:
        """Length in tokens of the prompt at dataset `position`."""
        slot = self._slot(position)
        return self._starts[slot + 1] - self._starts[slot]

    def request(self, position: int, ids: Ids, max_new_tokens: int) -> Request:
        """Return the prompt at `position` as a request with the row's id."""
        return Request(position, ids[position].decode(), self.token_ids(position), max_new_tokens)

    def first_of_equals(self) -> tuple[Positions, Repeats]:
        """Positions of the first row of each distinct prompt, and the rows that repeat those."""
        digests = np.frombuffer(self._digests, dtype=np.int64) if len(self) else np.empty(0, dtype=np.int64)
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        positions = self.positions
        firsts = positions[first[inverse]]
        is_first = firsts == positions
        for slot in np.flatnonzero(~is_first):
            # Of two different prompts with one digest both are asked.
            is_first[slot] = self.token_ids(int(firsts[slot])) != self.token_ids(int(positions[slot]))
        firsts, repeats = firsts[~is_first], positions[~is_first]
        order = np.argsort(firsts, kind="stable")
        return positions[is_first], Repeats(firsts[order], repeats[order])

    def remove(self) -> None:
        """Delete the scratch file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.path.unlink(missing_ok=True)

    def _shorten_prefix(self, tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
        if self._prefix is None:
            self._prefix = tokens[:-1]
            return
        length = min(len(self._prefix), len(tokens) - 1)
        different = np.flatnonzero(self._prefix[:length] != tokens[:length])
        self._prefix = self._prefix[: different[0] if len(different) else max(0, length)]

    def _slot(self, position: int) -> int:
        slot = int(np.searchsorted(self.positions, position))
        if slot >= len(self) or self._positions[slot] != position:
            raise KeyError(position)
        return slot
