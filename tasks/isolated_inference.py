"""Generation in a child process: its native death becomes a smaller batch, not the end of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from tasks.core.config import with_overrides
from tasks.core.generation.budget import TokenBudget
from tasks.core.generation.isolation import ChildDiedError, ChildEnd, run_in_child
from tasks.core.generation.ledger import Ledger, LedgerIndex
from tasks.core.generation.manifest import now
from tasks.core.generation.progress import GenerationProgress
from tasks.core.generation.run_dir import Session, append_session
from tasks.core.generation.runs import index_run
from tasks.core.generation.shards import Shard
from tasks.core.records import Completion
from tasks.part_work import ALONE, PartWork, Seat, hand_over

if TYPE_CHECKING:
    from tasks.inferencer import Inferencer, PreparedRows

logger = logging.getLogger(__name__)

# Native crashes that may or may not be for lack of memory are retried with half the batch this often.
UNCERTAIN_DEATHS = 3
IN_CHILD = {"inferencer.isolation": "none"}


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the child's next batch holds; `alone` is the id of its only row."""

    rows: int
    tokens: int
    alone: str | None


def generate_in_child(
    inferencer: Inferencer,
    prepared: PreparedRows,
    shard: Shard | None = None,
    *,
    seat: Seat = ALONE,
    stopped: Callable[[], bool] | None = None,
) -> LedgerIndex:
    """Generate in children until the ledger is whole: after a death with half the tokens, from the ledger on.

    With `shard` only its rows, else those of the whole run. A row that kills the child alone becomes an error
    row. Raises ChildDiedError when the child was ended by somebody, or keeps dying with no sign that memory is
    the reason; it is ended when `stopped` says so.
    """
    inferencer.release_model()
    work = hand_over(inferencer, prepared, shard, seat)
    work = replace(work, config=with_overrides(work.config, IN_CHILD))
    uncertain = 0
    while True:
        last = Admitted(0, 0, None)

        def hear(message: Admitted | GenerationProgress) -> None:
            nonlocal last
            if isinstance(message, Admitted):
                last = message
            elif inferencer.on_progress is not None:
                inferencer.on_progress(message)

        end = run_in_child(_generate, work, hear, stopped)
        if end is None:
            return index_run(prepared.run, prepared.rows)
        uncertain += not end.killed_for_memory
        if not end.may_be_memory or uncertain > UNCERTAIN_DEATHS or last.rows == 0:
            raise ChildDiedError(
                f"the generating process ended with {end.cause} at {last.rows} rows, {last.tokens} tokens",
                "run the same command again to resume; all rows finished so far are kept",
            )
        work = _after_death(work, prepared, end, last)


def _after_death(work: PartWork, prepared: PreparedRows, end: ChildEnd, last: Admitted) -> PartWork:
    """Write down what happened and return the work with half the tokens; a row alone becomes an error row."""
    message = f"the process ended with {end.cause}"
    part = prepared.run if work.shard is None else prepared.run.shard(work.shard)
    budget = TokenBudget(last.tokens, last.rows)
    budget.admit(last.rows, last.tokens)
    if last.alone is not None:
        budget.fail_row(message)
        with part.locked(), Ledger(part.ledger_path) as ledger:
            error = f"out of memory with this row alone: {message}"
            ledger.append(Completion(last.alone, "", "error", 0, 0, 0.0, 1, error=error))
    else:
        budget.shrink(message, kind="process_died")
    session = Session(
        engine="child process",
        shard=None if work.shard is None else work.shard.name,
        started_at=now(),
        seconds=0.0,
        rows=0,
        memory_events=budget.events_as_dicts(),
        limit_tokens=budget.limit_tokens,
    )
    append_session(part, session)
    smaller = {"inferencer.max_batch_tokens": budget.limit_tokens}
    return replace(work, config=with_overrides(work.config, smaller))


def _generate(connection: Connection, work: PartWork) -> None:
    """Run in the child: do generation and reference scores, telling the parent of every batch."""
    inferencer = work.take_over()
    inferencer.on_progress = connection.send
    inferencer.on_admit = lambda rows, tokens, alone: connection.send(Admitted(rows, tokens, alone))
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    if work.shard is not None:
        inferencer.answer_shard(prepared, work.shard)
        return
    inferencer.generate_responses(prepared)
    with prepared.locked():
        inferencer.score_references(prepared)
