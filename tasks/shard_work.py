"""A run in shards without Prefect: one after the other in this process, or side by side in spawned ones."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError
from tasks.core.generation.answering import index_run
from tasks.core.generation.likelihood import read_reference_score
from tasks.core.generation.runners.isolation import ChildDiedError
from tasks.core.generation.runners.seats import process_count, visible_gpus
from tasks.core.runs.ledger import ABSENT, LedgerIndex
from tasks.core.runs.shard_progress import watched
from tasks.core.runs.shards import Shard, all_shards, shard_numbers
from tasks.isolated_inference import generate_in_child
from tasks.part_work import Seat

if TYPE_CHECKING:
    from tasks.inferencer import Inferencer, PreparedRows

logger = logging.getLogger(__name__)

RETRIES = 2
"""How often one shard is begun again after its process died; it goes on from its ledger."""


def answer_in_shards(inferencer: Inferencer, prepared: PreparedRows) -> LedgerIndex:
    """Answer all shards and return where each row's line is. Holds the run directory's lock.

    The runner `threads` answers one shard after the other with one model, `processes` several at once, each in
    a process of its own. Raises ConfigError for the others, which need a Prefect flow.
    """
    runner = inferencer.settings.shard_runner
    if runner not in ("threads", "processes"):
        raise ConfigError(
            f'shard_runner = "{runner}" needs a Prefect flow',
            'run `tuneproof infer` (or the flow `infer`), or set shard_runner to "processes" or "threads"',
        )
    with supervised(inferencer, prepared) as pending:
        if runner == "threads":
            for shard in pending:
                inferencer.answer_shard(prepared, shard)
        else:
            _answer_in_processes(inferencer, prepared, pending)
    prepared.sync.pull()
    return index_run(prepared.run, prepared.rows)


@contextmanager
def supervised(inferencer: Inferencer, prepared: PreparedRows) -> Iterator[tuple[Shard, ...]]:
    """Hold the run's lock, show the progress of all shards, and give those that have something to do."""
    report, inferencer.on_progress = inferencer.on_progress, None  # a shard knows of its own rows only
    try:
        with prepared.locked():
            index = index_run(prepared.run, prepared.rows)
            with watched(prepared.run, index, report):
                yield pending_shards(inferencer, prepared, index)
    finally:
        inferencer.on_progress = report


def pending_shards(inferencer: Inferencer, prepared: PreparedRows, index: LedgerIndex) -> tuple[Shard, ...]:
    """Shards with rows that no ledger has, or whose references are still to be scored."""
    run, count = prepared.run, inferencer.settings.num_shards
    unanswered = set(shard_numbers(prepared.rows.ids[index.offsets == ABSENT], count).tolist())
    score = (
        inferencer.settings.score_references
        and read_reference_score(run.references_path, run.run_key) is None
    )
    return tuple(
        shard
        for shard in all_shards(count)
        if shard.index in unanswered
        or (score and read_reference_score(run.shard_references_path(shard), run.run_key) is None)
    )


def seats(inferencer: Inferencer, shards: int) -> tuple[Seat, ...]:
    """Places for the processes that answer at once: one for each GPU, or a share of the cores each."""
    settings = inferencer.settings
    gpus = visible_gpus(settings.device)
    count = process_count(settings.shard_processes, shards, gpus)
    if gpus:
        each = math.ceil(count / len(gpus))
        return tuple(Seat(gpus[number % len(gpus)], each) for number in range(count))
    return (Seat(processes=count),) * count


def _answer_in_processes(inferencer: Inferencer, prepared: PreparedRows, pending: Sequence[Shard]) -> None:
    if not pending:
        return
    inferencer.release_model()
    places = seats(inferencer, len(pending))
    free: queue.Queue[Seat] = queue.Queue()
    for place in places:
        free.put(place)
    stop = threading.Event()

    def answer(shard: Shard) -> None:
        place = free.get()
        try:
            _answer_with_retries(inferencer, prepared, shard, place, stop)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places), thread_name_prefix="shard") as lanes:
        futures = [lanes.submit(answer, shard) for shard in pending]
        try:
            raise_first_error(futures)
        except BaseException:
            stop.set()
            lanes.shutdown(cancel_futures=True)
            raise


def _answer_with_retries(
    inferencer: Inferencer, prepared: PreparedRows, shard: Shard, place: Seat, stop: threading.Event
) -> None:
    for attempt in range(RETRIES + 1):
        try:
            generate_in_child(inferencer, prepared, shard, seat=place, stopped=stop.is_set)
            return
        except ChildDiedError as exc:
            if attempt == RETRIES or stop.is_set():
                raise
            logger.warning(
                "shard %s: %s; it is begun again and goes on from its ledger", shard.name, exc.what
            )


def raise_first_error(futures: Sequence[Future[None]]) -> None:
    """Wait for all of them, so that none loses its work to another's error; then raise the first error."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
