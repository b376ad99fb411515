"""In several processes at once, each of which answers one shard at a time."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from tasks.core.generation.answering import index_run
from tasks.core.generation.plan import Report, RunPlan
from tasks.core.generation.runners.child import Child
from tasks.core.generation.runners.isolation import ChildDiedError
from tasks.core.generation.runners.seats import Seat
from tasks.core.generation.runners.shards import RETRIES, seats, supervised
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.shards import Shard

logger = logging.getLogger(__name__)


class Processes:
    """Answers the shards of a run side by side, in processes of this machine."""

    def answer(self, plan: RunPlan, report: Report | None = None) -> LedgerIndex:
        """Answer what is missing. Raises the first shard's error when all have ended; their answers are kept."""
        with supervised(plan, report) as pending:
            if pending:
                _answer_side_by_side(plan, pending)
        plan.sync.pull()
        return index_run(plan.run, plan.rows)


def _answer_side_by_side(plan: RunPlan, pending: Sequence[Shard]) -> None:
    places = seats(plan, len(pending))
    free: queue.Queue[Seat] = queue.Queue()
    for place in places:
        free.put(place)
    stop = threading.Event()

    def answer(shard: Shard) -> None:
        place = free.get()
        try:
            _answer_with_retries(replace(plan, part=shard, seat=place), stop)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places), thread_name_prefix="shard") as lanes:
        futures = [lanes.submit(answer, shard) for shard in pending]
        try:
            _raise_first_error(futures)
        except BaseException:
            stop.set()
            lanes.shutdown(cancel_futures=True)
            raise


def _answer_with_retries(plan: RunPlan, stop: threading.Event) -> None:
    for attempt in range(RETRIES + 1):
        try:
            Child(stop.is_set).answer(plan)
            return
        except ChildDiedError as exc:
            if attempt == RETRIES or stop.is_set():
                raise
            told = "shard %s: %s; it is begun again and goes on from its ledger"
            logger.warning(told, plan.place.path.name, exc.what)


def _raise_first_error(futures: Sequence[Future[None]]) -> None:
    """Wait for all of them, so that none loses its work to another's error; then raise the first error."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
