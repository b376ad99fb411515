"""Flights side by side on CPU: threads that step at the same time, each with its share of the cores.

About 60 % of a step are large matrix products, which two cores do in almost half of the time; the many small
operations between them hardly gain from a second core (docs/performance.md). Two lanes of one core each keep both
cores at work. All lanes take from one queue and hold rows against one budget.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.budget import TokenBudget
from tasks.core.generation.engine import GeneratedRow

# More would wait for each other: what Python does between the operations is done by one thread at a time.
MOST_LANES = 4
# With fewer rows a lane reads all weights for too few tokens.
SMALLEST_LANE_ROWS = 8

RoomOf = Callable[[Request], int]
"""Tokens that a request takes at most."""


def lane_count(device: str, rows: int) -> int:
    """How many lanes up to `rows` rows in flight are spread over: one off the CPU, where one step fills the device."""
    if device != "cpu":
        return 1
    return max(1, min(MOST_LANES, _cores.count(), rows // SMALLEST_LANE_ROWS))


class Admission:
    """What all lanes hold together, against one queue and one budget. Any thread may call its methods."""

    def __init__(self, queue: RequestQueue, budget: TokenBudget, lanes: int = 1, tokens: int = 0) -> None:
        """Begin with nothing but `tokens`, those of a prefix that all rows read."""
        self._queue, self._budget, self._lanes = queue, budget, lanes
        self._rows, self._tokens = 0, tokens
        self._changed = threading.Condition()
        self._idle_lanes = 0
        self._finished_since_clean = 0
        self._stopped = False

    def take(self, held: int, room: RoomOf, fits: Callable[[Request], bool]) -> Request | None:
        """Give a lane that holds `held` rows the next request, if it fits the lane's step and the budget."""
        with self._changed:
            request = self._queue.peek()
            if request is None or not fits(request) or not self._admits(held, room(request)):
                return None
            self._queue.take()
            self._rows += 1
            self._tokens += room(request)
            self._admit()  # before its slot is made: a failure there is one of all these rows
            return request

    def leave(self, request: Request, room: RoomOf) -> int:
        """Strike a finished row off; returns how many rows were in flight with it, itself included."""
        with self._changed:
            flying = self._rows
            self._rows -= 1
            self._tokens -= room(request)
            self._count_clean(flying)
            self._queue.finish(request.position)
            self._changed.notify_all()
            return flying

    def step(self) -> None:
        """Tell the budget what is about to be computed with."""
        with self._changed:
            self._admit()

    def wait_for_work(self, room: RoomOf) -> bool:
        """Sleep, for a lane without rows, until one may be taken; False when none will come."""
        with self._changed:
            self._idle_lanes += 1
            try:
                self._changed.wait_for(lambda: self._ended or self._may_take(room))
            finally:
                self._idle_lanes -= 1
            return not self._ended

    @property
    def stopped(self) -> bool:
        """Whether lanes should end before their next step."""
        return self._stopped

    def stop(self) -> None:
        """Let all lanes end before their next step."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def _ended(self) -> bool:
        return self._stopped or not self._queue

    def _may_take(self, room: RoomOf) -> bool:
        request = self._queue.peek()
        return request is not None and self._admits(0, room(request))

    def _admits(self, held: int, room_tokens: int) -> bool:
        """A row that would be alone is taken whatever the budget says: it must be tried once.

        No lane holds more than its share of the rows, and one without rows comes first.
        """
        if not self._rows:
            return True
        most_rows = min(self._budget.max_rows, self._rows + len(self._queue))
        if self._rows >= most_rows or held >= -(-most_rows // self._lanes) or (held and self._idle_lanes):
            return False
        return self._tokens + room_tokens <= self._budget.limit_tokens

    def _admit(self) -> None:
        self._budget.admit(self._rows, self._tokens, self._queue.only_taken_id)

    def _count_clean(self, flying: int) -> None:
        """A batch counts as fitted when as many rows as were in flight have come to their end.

        A step is no proof: rows have room reserved that they fill only later.
        """
        self._finished_since_clean += 1
        if self._finished_since_clean >= flying:
            self._finished_since_clean = 0
            self._budget.clean_batch()


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
            admission.stop()
            finished.put(exc)
        finally:
            finished.put(None)

    with _cores.shared_by(len(flights)) as share:
        lanes = [
            threading.Thread(target=copy_context().run, args=(fly, flight, share), name=f"lane-{number}", daemon=True)
            for number, flight in enumerate(flights)
        ]  # fmt: skip
        for lane in lanes:
            lane.start()
        try:
            yield from _until_all_end(finished, len(lanes))
        finally:
            admission.stop()
            for lane in lanes:
                lane.join()


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
