"""Generation in a child process: its native death becomes a smaller batch, not the end of the run."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from tasks.core.config import with_overrides
from tasks.core.generation.answering import budget_key, index_run, missing_mask
from tasks.core.generation.likelihood import read_reference_score
from tasks.core.generation.runners.deaths import Admitted, DeathLadder, Step
from tasks.core.generation.runners.isolation import ChildDiedError, ChildEnd, run_in_child
from tasks.core.memory.budget import BudgetStore, HandedOnStore, MemoryEvent
from tasks.core.provenance import now
from tasks.core.records import Completion
from tasks.core.runs.ledger import Ledger, LedgerIndex, count_lines
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.sessions import Session, append_session
from tasks.core.runs.shards import Shard
from tasks.part_work import ALONE, PartWork, Seat, hand_over

if TYPE_CHECKING:
    from tasks.inferencer import Inferencer, PreparedRows

logger = logging.getLogger(__name__)

IN_CHILD = {"inferencer.isolation": "none"}


@dataclass(frozen=True, slots=True)
class Began:
    """What a child says before its first batch; `budget_key` is where its learned budget is kept."""

    budget_key: str
    engine: str
    device: str


@dataclass(slots=True)
class Heard:
    """What the parent knows of a child from its messages."""

    began: Began | None = None
    last: Admitted = field(default_factory=lambda: Admitted(0, 0))


def generate_in_child(
    inferencer: Inferencer,
    prepared: PreparedRows,
    shard: Shard | None = None,
    *,
    seat: Seat = ALONE,
    stopped: Callable[[], bool] | None = None,
) -> LedgerIndex:
    """Generate in children until the ledger is whole: after a death with half the tokens, from the ledger on.

    With `shard` only its rows, else those of the whole run. A row that is alone at two deaths becomes an error
    row. Raises ChildDiedError when the child was ended by somebody, or keeps dying where no smaller batch is left
    to try; it is ended when `stopped` says so.
    """
    inferencer.release_model()
    work = hand_over(inferencer, prepared, shard, seat)
    work = replace(work, config=with_overrides(work.config, IN_CHILD))
    deaths = _Deaths(prepared, shard, inferencer.budget_store)
    while True:
        heard = Heard()

        def hear(message: Began | Admitted | GenerationProgress, heard: Heard = heard) -> None:
            if isinstance(message, Began):
                heard.began = message
            elif isinstance(message, Admitted):
                heard.last = message
            elif inferencer.on_progress is not None:
                inferencer.on_progress(message)

        work = replace(work, budget_store=HandedOnStore(inferencer.budget_store, deaths.ladder.learned))
        try:
            end = run_in_child(_generate, work, hear, stopped)
        except BaseException:
            deaths.count_answered()
            deaths.remember(heard)
            raise
        if end is None:
            return index_run(prepared.run, prepared.rows)
        step = deaths.write_down(end, heard)
        if deaths.missing == 0 and _has_references(inferencer, prepared, shard):
            return index_run(prepared.run, prepared.rows)
        if step == "give_up":
            deaths.remember(heard)
            held = heard.last
            raise ChildDiedError(
                f"the generating process ended with {end.cause} at {held.rows} rows, {held.tokens} tokens",
                "run the same command again to resume; all rows finished so far are kept",
            )


class _Deaths:
    """The deaths of one run's or shard's children: what they left, and what follows from them."""

    def __init__(self, prepared: PreparedRows, shard: Shard | None, store: BudgetStore) -> None:
        self.ladder = DeathLadder()
        self._prepared, self._shard, self._store = prepared, shard, store
        self._part = prepared.run if shard is None else prepared.run.shard(shard)
        self.missing = self._count_missing()

    def count_answered(self) -> int:
        """Return how many rows the last child answered."""
        before, self.missing = self.missing, self._count_missing()
        if before > self.missing:
            self.ladder.made_progress()
        return before - self.missing

    def remember(self, heard: Heard) -> None:
        """Keep a limit that holds for the next run; a child that ends well keeps it itself."""
        learned = self.ladder.learned
        if heard.began is not None and self.ladder.holds and learned is not None and learned.failed_tokens:
            self._store.save(heard.began.budget_key, learned)

    def write_down(self, end: ChildEnd, heard: Heard) -> Step:
        """Note a death in the sessions, and the row that it was for in the ledger; return what comes next."""
        self.count_answered()
        last, rows_before = heard.last, count_lines(self._part.ledger_path)
        if last.alone is not None and not self._is_missing(last.alone):
            last = replace(last, alone=None)  # it is answered: what died came later
        if not end.may_be_memory or heard.began is None:
            return "give_up"
        step = self.ladder.step_after(last, for_memory=end.killed_for_memory)
        message = f"the process ended with {end.cause}"
        if step == "fail_row" and last.alone is not None:
            self._fail_row(last.alone, message, for_memory=end.killed_for_memory)
        learned, kind = self.ladder.learned, "row_failed" if step == "fail_row" else "process_died"
        limit_tokens = last.tokens if learned is None else learned.limit_tokens
        event = MemoryEvent(kind, last.rows, last.tokens, limit_tokens, message)
        logger.warning(
            "memory: %s at %d rows, %d tokens; the next process starts with a limit of %d tokens",
            *(message, last.rows, last.tokens, limit_tokens),
        )
        append_session(self._part, self._session(heard.began, rows_before, event))
        return step

    def _session(self, began: Began, rows_before: int, death: MemoryEvent) -> Session:
        """A session of no time that tells of a death; what the child did is in the child's own."""
        return Session(
            engine=began.engine,
            shard=None if self._shard is None else self._shard.name,
            host=socket.gethostname(),
            started_at=now("milliseconds"),
            seconds=0.0,
            rows=count_lines(self._part.ledger_path) - rows_before,
            memory_events=(asdict(death),),
            limit_tokens=death.limit_tokens,
            device=began.device,
            rows_before=rows_before,
        )

    def _fail_row(self, row_id: str, message: str, *, for_memory: bool) -> None:
        cause = "out of memory with this row alone" if for_memory else "no answer with this row alone, twice"
        with self._part.locked(), Ledger(self._part.ledger_path, self._prepared.run.run_key) as ledger:
            ledger.append(Completion(row_id, "", "error", 0, 0, 0.0, 1, error=f"{cause}: {message}"))
        self.missing -= 1

    def _count_missing(self) -> int:
        return int(missing_mask(self._prepared.run, self._prepared.rows, self._shard).sum())

    def _is_missing(self, row_id: str) -> bool:
        missing = missing_mask(self._prepared.run, self._prepared.rows, self._shard)
        return bool(missing[self._prepared.rows.ids == row_id.encode()].any())


def _has_references(inferencer: Inferencer, prepared: PreparedRows, shard: Shard | None) -> bool:
    """Whether the child had nothing left to do after the last row."""
    run = prepared.run
    path = run.references_path if shard is None else run.shard_references_path(shard)
    return not inferencer.settings.score_references or read_reference_score(path, run.run_key) is not None


def _generate(connection: Connection, work: PartWork) -> None:
    """Run in the child: do generation and reference scores, telling the parent of every batch."""
    inferencer = work.take_over()
    inferencer.on_progress = connection.send
    began = False

    def tell(rows: int, tokens: int, alone: str | None) -> None:
        nonlocal began
        if not began:
            model = inferencer.load_model_and_tokenizer()
            connection.send(Began(budget_key(model), inferencer.engine_name, model.device))
            began = True
        connection.send(Admitted(rows, tokens, alone))

    inferencer.on_admit = tell
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    if work.shard is not None:
        inferencer.answer_shard(prepared, work.shard)
        return
    inferencer.generate_responses(prepared)
    with prepared.locked():
        inferencer.score_references(prepared)
