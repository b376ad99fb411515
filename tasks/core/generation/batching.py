"""Which rows are answered together: longest first, admitted by tokens."""

from __future__ import annotations

from collections import deque
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

    Holds positions only (8 bytes a row); a request is read when it is taken. Rows taken but not
    finished can be put back with `restore`, which is what happens after running out of memory. Engines that work in
    several lanes `deal` the rows; without that all are in lane 0.
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
        self._positions = places[order]
        self.shared_prefix = shared_prefix
        """Tokens that all prompts begin with; each prompt has at least one more."""
        self.largest_room_tokens = (int(lengths.max()) if len(lengths) else 0) + largest_answer_tokens
        """Tokens that the largest row needs at most."""
        self._read = read
        self._taken: dict[int, Request] = {}
        self._returned: list[deque[Request]] = [deque()]
        # Of each lane: its next place in the order; a lane has every n-th place.
        self._next = [0]
        self._peeked: list[Request | None] = [None]

    def __len__(self) -> int:
        return sum(self.waiting(lane) for lane in range(len(self._next)))

    def waiting(self, lane: int = 0) -> int:
        """Rows of a lane that nobody has taken."""
        places_left = max(0, len(self._positions) - self._next[lane])
        return -(-places_left // len(self._next)) + len(self._returned[lane])

    @property
    def unfinished(self) -> int:
        """Rows waiting or taken."""
        return len(self) + len(self._taken)

    @property
    def only_taken_id(self) -> str | None:
        """Id of the row that is taken when it is the only one."""
        return next(iter(self._taken.values())).id if len(self._taken) == 1 else None

    def deal(self, lanes: int) -> None:
        """Divide what waits among `lanes`, each with every n-th row: which row is whose depends on nothing else."""
        old = len(self._next)
        if lanes == old == 1:
            return
        left = np.sort(np.concatenate([np.arange(start, len(self._positions), old) for start in self._next]))
        self._positions = self._positions[left]
        returned = _longest_first(request for lane in self._returned for request in lane)
        self._returned = [deque(returned[lane::lanes]) for lane in range(lanes)]
        self._next = list(range(lanes))
        self._peeked = [None] * lanes

    def peek(self, lane: int = 0) -> Request | None:
        """Return the lane's next request without taking it, or None when nothing waits."""
        if self._returned[lane]:
            return self._returned[lane][0]
        if self._next[lane] >= len(self._positions):
            return None
        request = self._peeked[lane]
        if request is None:
            request = self._peeked[lane] = self._read(int(self._positions[self._next[lane]]))
        return request

    def take(self, lane: int = 0) -> Request:
        """Take the lane's next request. Raises IndexError when nothing waits."""
        request = self.peek(lane)
        if request is None:
            raise IndexError("no request is waiting")
        if self._returned[lane]:
            self._returned[lane].popleft()
        else:
            self._next[lane] += len(self._next)
            self._peeked[lane] = None
        self._taken[request.position] = request
        return request

    def finish(self, position: int) -> Request:
        """Strike a taken row off; its request is returned."""
        return self._taken.pop(position)

    def restore(self) -> list[Request]:
        """Put all taken, unfinished rows back in front, in one lane, and return them."""
        self.deal(1)
        back = _longest_first(self._taken.values())
        self._returned = [deque(_longest_first([*back, *self._returned[0]]))]
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


def _longest_first(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: (-len(request.token_ids), request.position))
