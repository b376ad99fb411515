"""Which rows are answered together: longest first, admitted by tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer. `position` is the row's place in the dataset."""

    position: int
    id: str
    token_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def room_tokens(self) -> int:
        """Tokens the row needs at most: its prompt and the longest answer it may give."""
        return len(self.token_ids) + self.max_new_tokens


class RequestQueue:
    """Waiting rows, longest prompt first, so that the largest batch comes first and memory trouble shows at once.

    Holds positions and lengths only (12 bytes a row); a request is read when it is taken. Rows taken but not
    finished can be put back with `restore`, which is what happens after running out of memory.
    """

    def __init__(
        self,
        positions: Iterable[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
        prompt_lengths: Iterable[int] | np.ndarray[tuple[int], np.dtype[np.int32]],
        read: Callable[[int], Request],
        *,
        shared_prefix: tuple[int, ...] = (),
        largest_answer_tokens: int = 0,
    ) -> None:
        places = np.asarray(positions, dtype=np.int64)
        lengths = np.asarray(prompt_lengths, dtype=np.int32)
        order = np.lexsort((places, -lengths.astype(np.int64)))  # longest first, dataset order among equals
        self._positions, self._lengths = places[order], lengths[order]
        self.shared_prefix = shared_prefix
        """Tokens that all prompts begin with; each prompt has at least one more."""
        self.largest_room_tokens = (int(lengths.max()) if len(lengths) else 0) + largest_answer_tokens
        """Tokens that the largest row needs at most."""
        self._next = 0
        self._read = read
        self._taken: dict[int, Request] = {}
        self._returned: list[tuple[int, int, Request]] = []
        self._peeked: Request | None = None

    def __len__(self) -> int:
        return len(self._positions) - self._next + len(self._returned)

    @property
    def unfinished(self) -> int:
        """Rows waiting or taken."""
        return len(self) + len(self._taken)

    @property
    def only_taken_id(self) -> str | None:
        """Id of the row that is taken when it is the only one."""
        return next(iter(self._taken.values())).id if len(self._taken) == 1 else None

    def peek(self) -> Request | None:
        """Return the next request without taking it, or None when nothing waits."""
        if self._returned:
            return self._returned[0][2]
        if self._next >= len(self._positions):
            return None
        if self._peeked is None:
            self._peeked = self._read(int(self._positions[self._next]))
        return self._peeked

    def take(self) -> Request:
        """Take the next request. Raises IndexError when nothing waits."""
        request = self.peek()
        if request is None:
            raise IndexError("no request is waiting")
        if self._returned:
            heapq.heappop(self._returned)
        else:
            self._next += 1
            self._peeked = None
        self._taken[request.position] = request
        return request

    def finish(self, position: int) -> Request:
        """Strike a taken row off; its request is returned."""
        return self._taken.pop(position)

    def restore(self) -> list[Request]:
        """Put all taken, unfinished rows back in front and return them."""
        back = sorted(self._taken.values(), key=lambda request: (-len(request.token_ids), request.position))
        for request in back:
            heapq.heappush(self._returned, (-len(request.token_ids), request.position, request))
        self._taken.clear()
        return back

    def take_batch(
        self, limit_tokens: int, max_rows: int, *, alone_beyond_tokens: int | None = None
    ) -> list[Request]:
        """Take rows while a padded batch of them stays within `limit_tokens` and `max_rows`; at least one.

        A row that may need more than `alone_beyond_tokens` is a batch of its own.
        """
        batch: list[Request] = []
        widest_prompt = widest_answer = 0
        while len(batch) < max_rows and (request := self.peek()) is not None:
            prompt = max(widest_prompt, len(request.token_ids))
            answer = max(widest_answer, request.max_new_tokens)
            if batch and (len(batch) + 1) * (prompt + answer) > limit_tokens:
                break
            alone = alone_beyond_tokens is not None and request.room_tokens > alone_beyond_tokens
            if batch and alone:
                break
            widest_prompt, widest_answer = prompt, answer
            batch.append(self.take())
            if alone:
                break
        return batch
