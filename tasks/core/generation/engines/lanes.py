"""Flights side by side on CPU: threads that step at the same time, each with its share of the cores.

About 60 % of a step are large matrix products, which two cores do in almost half of the time; the many small
operations between them hardly gain from a second core (docs/performance.md). Two lanes of one core each keep both
cores at work. Rows and budget are divided beforehand and no lane waits for another, so that which rows share a step
does not depend on which thread is quicker.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.memory.budget import TokenBudget

logger = logging.getLogger(__name__)

# More would wait for each other: what Python does between the operations is done by one thread at a time.
MOST_LANES = 4
# With fewer rows a lane reads all weights for too few tokens.
SMALLEST_LANE_ROWS = 8


def lane_count(device: str, rows: int, fitting_rows: int | None = None) -> int:
    """How many lanes up to `rows` rows in flight are spread over: one off the CPU, where one step fills the device.

    `fitting_rows` is how many of the largest rows the budget holds; each lane must hold one of them.
    """
    if device != "cpu":
        return 1
    lanes = min(MOST_LANES, _cores.count(), rows // SMALLEST_LANE_ROWS)
    return max(1, lanes if fitting_rows is None else min(lanes, fitting_rows))


class Admission:
    """What all lanes hold together, against one queue and one budget. Any thread may use it, through its `Lane`."""

    def __init__(
        self, queue: RequestQueue, budget: TokenBudget, lanes: int = 1, prefix_tokens: int = 0
    ) -> None:
        """Deal the rows; `prefix_tokens` are those of a prefix that all rows read in one place."""
        queue.deal(lanes)
        self.queue, self.budget, self.prefix_tokens = queue, budget, prefix_tokens
        self.lanes = [Lane(self, number) for number in range(lanes)]
        self.lock = threading.Lock()
        self.stopped = False
        """Whether lanes should end before their next step."""
        self._finished_since_clean = 0

    @property
    def rows(self) -> int:
        """Rows in flight."""
        return sum(lane.rows for lane in self.lanes)

    def admit(self) -> None:
        """Tell the budget what is held."""
        tokens = self.prefix_tokens + sum(lane.tokens for lane in self.lanes)
        self.budget.admit(self.rows, tokens, self.queue.only_taken_id)

    def count_clean(self, flying: int) -> None:
        """Count one finished row; a batch fitted when as many as were in flight have come to their end.

        A step is no proof: rows have room reserved that they fill only later.
        """
        self._finished_since_clean += 1
        if self._finished_since_clean >= flying:
            self._finished_since_clean = 0
            self.budget.clean_batch()


class Lane:
    """The rows of one flight: what it may take, and what it holds."""

    def __init__(self, admission: Admission, number: int) -> None:
        self._all, self._number = admission, number
        self.rows = self.tokens = 0
        """Held by this lane; tokens without those of the prefix."""

    @property
    def stopped(self) -> bool:
        """Whether the flight should end before its next step."""
        return self._all.stopped

    @property
    def waiting(self) -> int:
        """Rows of this lane that are still to come."""
        return self._all.queue.waiting(self._number)

    def take(self, fits: Callable[[Request], bool]) -> Request | None:
        """Return the next request if it fits the lane's step and its share of the budget."""
        with self._all.lock:
            request = self._all.queue.peek(self._number)
            if request is None or not fits(request) or not self._admits(request):
                return None
            self._all.queue.take(self._number)
            self.rows += 1
            self.tokens += self._room(request)
            self._all.admit()  # before its slot is made: a failure there is one of all these rows
            return request

    def leave(self, request: Request, flying: int) -> None:
        """Strike off a row that finished in a step with `flying` rows in flight."""
        with self._all.lock:
            self.rows -= 1
            self.tokens -= self._room(request)
            self._all.count_clean(flying)
            self._all.queue.finish(request.position)

    def step(self) -> int:
        """Tell the budget what is about to be computed with; returns how many rows are in flight in all lanes."""
        with self._all.lock:
            self._all.admit()
            return self._all.rows

    def _room(self, request: Request) -> int:
        """Tokens that the request takes besides the prefix that all rows read in one place."""
        return request.room_tokens - self._all.prefix_tokens

    def _admits(self, request: Request) -> bool:
        """A row that would be alone is taken whatever the budget says: it must be tried once."""
        if not self.rows:
            return True
        lanes, budget = len(self._all.lanes), self._all.budget
        share_tokens = (budget.limit_tokens - self._all.prefix_tokens) // lanes
        return self.rows < budget.max_rows // lanes and self.tokens + self._room(request) <= share_tokens


def side_by_side(
    flights: Sequence[Callable[[], Iterator[GeneratedRow]]], admission: Admission
) -> Iterator[GeneratedRow]:
    """Run each flight in a thread and yield rows as they finish; one alone runs in this thread.

    The first error of a lane ends the others before their next step and is raised after the rows that were finished
    until then. No thread goes on when this ends, however it ends.
    """
    if len(flights) == 1:
        yield from flights[0]()
        return
    finished: SimpleQueue[GeneratedRow | BaseException | None] = SimpleQueue()

    def fly(flight: Callable[[], Iterator[GeneratedRow]], threads: int) -> None:
        try:
            _cores.use(threads)
            for row in flight():
                finished.put(row)
        except BaseException as exc:
            admission.stopped = True
            finished.put(exc)
        finally:
            finished.put(None)

    lanes: list[threading.Thread] = []
    with _cores.shared_by(len(flights)) as share:
        try:
            for number, flight in enumerate(flights):
                run = functools.partial(copy_context().run, fly, flight, share)
                lane = threading.Thread(target=run, name=f"lane-{number}", daemon=True)
                lane.start()
                lanes.append(lane)
        except RuntimeError as exc:  # the system has no more threads for us
            logger.warning("generation goes on with %d of %d lanes: %s", len(lanes), len(flights), exc)
        try:
            yield from _until_all_end(finished, len(lanes))
        finally:
            admission.stopped = True
            for lane in lanes:
                lane.join()
    if len(lanes) < len(flights):
        admission.stopped = False
        for flight in flights[len(lanes) :]:
            yield from flight()


def _until_all_end(
    finished: SimpleQueue[GeneratedRow | BaseException | None], lanes: int
) -> Iterator[GeneratedRow]:
    failure: BaseException | None = None
    while lanes:
        told = finished.get()
        if told is None:
            lanes -= 1
        elif isinstance(told, BaseException):
            failure = failure or told
        else:
            yield told
    if failure is not None:
        raise failure


class _Cores:
    """The threads that torch's operations use, divided among lanes and given back afterwards.

    torch keeps the number for each thread, and the newest one for threads to come: it is read and set back under a
    lock, since two sessions may run at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions = 0
        self._all = 1

    def count(self) -> int:
        """Threads that an operation outside of lanes may use."""
        import torch

        with self._lock:
            return self._all if self._sessions else torch.get_num_threads()

    @contextmanager
    def shared_by(self, lanes: int) -> Iterator[int]:
        """Yield the threads that each lane may use."""
        import torch

        with self._lock:
            if not self._sessions:
                self._all = torch.get_num_threads()
            self._sessions += 1
            share = max(1, self._all // lanes)
        try:
            yield share
        finally:
            with self._lock:
                self._sessions -= 1
                torch.set_num_threads(self._all)

    def use(self, threads: int) -> None:
        """Set the number for the operations of the calling thread."""
        import torch

        torch.set_num_threads(threads)


_cores = _Cores()
