"""Generation in a child process: its native death becomes a smaller batch, not the end of the run."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

from tasks.core.config import with_overrides
from tasks.core.generation.answering import budget_key, index_run, missing_mask
from tasks.core.generation.likelihood import read_reference_score
from tasks.core.generation.plan import Report, RunPlan
from tasks.core.generation.runners.deaths import Admitted, DeathLadder, Step
from tasks.core.generation.runners.isolation import ChildDiedError, ChildEnd, run_in_child
from tasks.core.interruption import is_interrupted, raise_if_interrupted
from tasks.core.memory.budget import HandedOnStore
from tasks.core.models.libraries import import_in_child
from tasks.core.provenance import now
from tasks.core.records import Completion, MemoryEvent
from tasks.core.runs.ledger import Ledger, LedgerIndex, Mask, count_lines
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.sessions import Session, append_session

logger = logging.getLogger(__name__)

IN_CHILD = {"inferencer.isolation": "none"}


@dataclass(frozen=True, slots=True)
class Began:
    """What a child says before its first batch; `budget_key` is where its learned budget is kept."""

    budget_key: str
    engine: str
    device: str


@dataclass(frozen=True, slots=True)
class ScoredSoFar:
    """How far a child is with the references."""

    progress: GenerationProgress


@dataclass(slots=True)
class Heard:
    """What the parent knows of a child from its messages."""

    began: Began | None = None
    last: Admitted = field(default_factory=lambda: Admitted(0, 0))


class Child:
    """Answers a run or a shard in child processes until the ledger is whole: after a death with half the tokens.

    A row that is alone at two deaths becomes an error row. The child is ended when `stopped` says so.
    """

    def __init__(
        self, stopped: Callable[[], bool] = is_interrupted, *, report_references: Report | None = None
    ) -> None:
        self._stopped, self._report_references = stopped, report_references

    def answer(self, plan: RunPlan, report: Report | None = None) -> LedgerIndex:
        """Answer what is missing and score the references.

        Raises ChildDiedError when the child was ended by somebody, or keeps dying where no smaller batch is left
        to try.
        """
        work = replace(plan, config=with_overrides(plan.config, IN_CHILD))
        deaths = _Deaths(plan)
        while True:
            heard = Heard()
            try:
                end = self._run(work, deaths, heard, report)
            except BaseException:
                deaths.count_answered()
                deaths.remember(heard)
                raise
            if end is None:
                break
            step = deaths.write_down(end, heard)
            if deaths.missing == 0 and _has_references(plan):
                break
            if step == "give_up":
                deaths.remember(heard)
                raise_if_interrupted()  # then it was ended from here, and is not to be begun again
                held = heard.last
                raise ChildDiedError(
                    f"the generating process ended with {end.cause} at {held.rows} rows, {held.tokens} tokens",
                    "run the same command again to resume; all rows finished so far are kept",
                )
        return index_run(plan.run, plan.rows)

    def _run(self, work: RunPlan, deaths: _Deaths, heard: Heard, report: Report | None) -> ChildEnd | None:
        def hear(message: Began | Admitted | ScoredSoFar | GenerationProgress) -> None:
            if isinstance(message, Began):
                heard.began = message
            elif isinstance(message, Admitted):
                heard.last = message
            elif isinstance(message, ScoredSoFar):
                if self._report_references is not None:
                    self._report_references(message.progress)
            elif report is not None:
                report(message)

        handed_on = HandedOnStore(work.budget_store, deaths.ladder.learned)
        return run_in_child(_answer, replace(work, budget_store=handed_on), hear, self._stopped)


class _Deaths:
    """The deaths of one run's or shard's children: what they left, and what follows from them."""

    def __init__(self, plan: RunPlan) -> None:
        self.ladder = DeathLadder()
        self._plan, self._part = plan, plan.place
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
            self._plan.budget_store.save(heard.began.budget_key, learned)

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
        event = MemoryEvent(
            kind=kind, rows=last.rows, tokens=last.tokens, limit_tokens=limit_tokens, message=message
        )
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
            shard=None if self._plan.part is None else self._plan.part.name,
            host=socket.gethostname(),
            started_at=now("milliseconds"),
            seconds=0.0,
            rows=count_lines(self._part.ledger_path) - rows_before,
            memory_events=(death,),
            limit_tokens=death.limit_tokens,
            device=began.device,
            rows_before=rows_before,
        )

    def _fail_row(self, row_id: str, message: str, *, for_memory: bool) -> None:
        cause = "out of memory with this row alone" if for_memory else "no answer with this row alone, twice"
        with self._part.locked(), Ledger(self._part.ledger_path, self._plan.run.run_key) as ledger:
            ledger.append(Completion(row_id, "", "error", 0, 0, 0.0, 1, error=f"{cause}: {message}"))
        self.missing -= 1

    def _count_missing(self) -> int:
        return int(self._missing().sum())

    def _is_missing(self, row_id: str) -> bool:
        return bool(self._missing()[self._plan.rows.ids == row_id.encode()].any())

    def _missing(self) -> Mask:
        return missing_mask(self._plan.run, self._plan.rows, self._plan.part)


def _has_references(plan: RunPlan) -> bool:
    """Whether the child had nothing left to do after the last row."""
    is_wanted = plan.config.inferencer.score_references
    return not is_wanted or read_reference_score(plan.references_path, plan.identity) is not None


def _answer(connection: Connection, work: RunPlan) -> None:
    """Run in the child: do generation and reference scores, telling the parent of every batch."""
    work.seat.take()  # before a library may look at the GPUs
    import_in_child()
    answerer, plan = work.take_over()
    answerer.on_progress = connection.send
    answerer.on_reference_progress = lambda progress: connection.send(ScoredSoFar(progress))
    began = False

    def tell(rows: int, tokens: int, alone: str | None) -> None:
        nonlocal began
        if not began:
            model = answerer.load_model_and_tokenizer()
            connection.send(Began(budget_key(model), answerer.engine_name, model.device))
            began = True
        connection.send(Admitted(rows, tokens, alone))

    answerer.on_admit = tell
    if plan.part is not None:
        answerer.answer_shard(plan, plan.part)
        return
    answerer.generate_responses(plan)
    with plan.locked():
        answerer.score_references(plan)
