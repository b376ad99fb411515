"""What all ways of answering in shards share: the run's lock, which shards are left, and who sits where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.core.generation.answering import index_run
from tasks.core.generation.likelihood import read_reference_score
from tasks.core.generation.plan import Report, RunPlan
from tasks.core.generation.runners.seats import Seat, process_count, visible_gpus
from tasks.core.runs.ledger import ABSENT, LedgerIndex
from tasks.core.runs.shard_progress import watched
from tasks.core.runs.shards import Shard, all_shards, shard_numbers

RETRIES = 2
"""How often one shard is begun again after its process died; it goes on from its ledger."""


@contextmanager
def supervised(plan: RunPlan, report: Report | None) -> Iterator[tuple[Shard, ...]]:
    """Hold the run's lock, show the progress of all shards, and give those that have something to do."""
    with plan.locked():
        index = index_run(plan.run, plan.rows)
        with watched(plan.run, index, report):
            yield pending_shards(plan, index)


def pending_shards(plan: RunPlan, index: LedgerIndex) -> tuple[Shard, ...]:
    """Shards with rows that no ledger has, or whose references are still to be scored."""
    run, settings = plan.run, plan.config.inferencer
    count = settings.num_shards
    unanswered = set(shard_numbers(plan.rows.ids[index.offsets == ABSENT], count).tolist())
    score = settings.score_references and read_reference_score(run.references_path, plan.identity) is None
    return tuple(
        shard
        for shard in all_shards(count)
        if shard.index in unanswered
        or (score and read_reference_score(run.shard_references_path(shard), plan.identity) is None)
    )


def seats(plan: RunPlan, shards: int) -> tuple[Seat, ...]:
    """Places for the processes that answer at once: one for each GPU, or a share of the cores each."""
    settings = plan.config.inferencer
    gpus = visible_gpus(settings.device)
    count = process_count(settings.shard_processes, shards, gpus)
    if gpus:
        each = math.ceil(count / len(gpus))
        return tuple(Seat(gpus[number % len(gpus)], each) for number in range(count))
    return (Seat(processes=count),) * count
