"""The ladder: when memory runs out, free it, shrink, and go on with the rows that are unfinished."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import tenacity

from tasks.core.errors import OutOfMemoryError, first_line
from tasks.core.generation.batching import RequestQueue
from tasks.core.generation.engines.base import Engine, GeneratedRow
from tasks.core.generation.stepping import StepThread
from tasks.core.interruption import raise_if_interrupted
from tasks.core.memory.budget import TokenBudget
from tasks.core.memory.device_memory import forget_traceback, is_out_of_memory, release

logger = logging.getLogger(__name__)


def generate_all(
    engine: Engine, queue: RequestQueue, budget: TokenBudget, *, device: str
) -> Iterator[GeneratedRow]:
    """Yield every row of `queue`, whatever memory does: a row that does not fit alone comes back as an error row.

    Errors other than running out of memory pass through. Raises KeyboardInterrupt after a Ctrl-C, see interruption.py.
    """
    with StepThread() as thread:
        ladder = _Ladder(engine, queue, budget, thread)
        # `Retrying` calls a function; rows must leave one by one. Each attempt therefore pulls rows until the engine
        # is done or fails, and hands every finished row out before it asks for the next one.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_out_of_memory),
            before_sleep=ladder.step_down,
            sleep=lambda _seconds: release(device),
            reraise=True,
        )
        try:
            while (row := retrying(thread.call, ladder.next_row)) is not None:
                yield row
                raise_if_interrupted()
        finally:
            ladder.close()


class _Ladder:
    """The rows that an engine gives, and the steps down when memory runs out under it."""

    def __init__(self, engine: Engine, queue: RequestQueue, budget: TokenBudget, thread: StepThread) -> None:
        self._engine, self._queue, self._budget, self._thread = engine, queue, budget, thread
        self._rows: Iterator[GeneratedRow] = iter(())
        self._failed_rows: list[GeneratedRow] = []
        self._tried_alone: set[int] = set()

    def next_row(self) -> GeneratedRow | None:
        """Return the next row that is finished, or None when none is left."""
        if self._failed_rows:
            return self._failed_rows.pop(0)
        try:
            row = next(self._rows, None)
            if row is None and self._queue.unfinished:
                self._rows = self._engine.generate(self._queue, self._budget)
                row = next(self._rows, None)
        except BaseException:
            self._rows = iter(())  # lets go of the engine's frame and the tensors in it
            raise
        return row

    def step_down(self, retry_state: tenacity.RetryCallState) -> None:
        """Run between attempts, outside of any except block; the exception is reduced to its message first."""
        outcome = retry_state.outcome
        exc = outcome.exception() if outcome is not None else None
        if exc is None:
            return
        message = first_line(exc)
        forget_traceback(exc)
        self._thread.replace_after(message)
        returned = self._queue.restore()
        if not returned:
            raise OutOfMemoryError(
                f"memory ran out before any row was started: {message}",
                "free memory, or use a smaller model, load_in_8bit or load_in_4bit",
            )
        alone = max(self._budget.rows_in_flight, len(returned)) == 1
        if alone and returned[0].position in self._tried_alone:
            request = self._queue.take()
            self._queue.finish(request.position)
            self._budget.fail_row(message)
            self._failed_rows.append(_error_row(request.position, message))
        else:  # a row that is alone may have had the slots of finished rows beside it: it is tried once more
            self._tried_alone.update(request.position for request in returned if alone)
            self._budget.shrink(message)

    def close(self) -> None:
        """End the engine's steps now: the frame of an error that is on its way would keep them going."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()


def _error_row(position: int, message: str) -> GeneratedRow:
    text = f"out of memory with this row alone: {message}"
    return GeneratedRow(position, (), text, "error", seconds=0.0, batch_size=1)
