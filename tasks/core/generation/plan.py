"""What is answered: the rows, model, settings, place and part of one run, as one record that any process takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from tasks.core.config import Config
from tasks.core.generation.runners.seats import ALONE, Seat
from tasks.core.memory.budget import BudgetStore, TokenBudget
from tasks.core.records import RunIdentity
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.rows import RunRows
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.shards import Shard
from tasks.core.runs.sync import RunSync
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel, ModelSpec
    from tasks.core.prompts.tokens import PromptBuilder
    from tasks.core.runs.manifest import ReferenceScore

Report = Callable[[GenerationProgress], None]
"""Told how far the rows of a plan are."""


@dataclass(frozen=True)
class RunPlan:
    """One run, or with `part` one shard of it: what is asked, of which model, with which settings, kept where.

    It can be pickled; another process, machine or part gets `replace(plan, …)`. `spec` names the model as other
    machines find it. `answerer` is the class that does the work, made anew in each process; `seat` says where it
    works there.
    """

    rows: RunRows
    identity: RunIdentity
    spec: ModelSpec
    config: Config
    run_name: str
    store: Store
    answerer: type[Answerer]
    budget_store: BudgetStore
    seat: Seat = ALONE
    part: Shard | None = None

    @property
    def run(self) -> RunDir:
        """The run's directory on this machine."""
        return RunDir(self.store.local / self.run_name)

    @property
    def place(self) -> RunDir:
        """Where the answers are written: the run's directory, or that of the part."""
        return self.run if self.part is None else self.run.shard(self.part)

    @property
    def references_path(self) -> Path:
        """Where the references of the run, or of the part, are scored."""
        return self.run.references_path if self.part is None else self.run.shard_references_path(self.part)

    @property
    def sync(self) -> RunSync:
        """What brings the run here and sends it back."""
        return RunSync(self.store, self.run, self.config.pipeline.sync_seconds)

    @property
    def is_split(self) -> bool:
        """Whether the rows are to be answered in shards."""
        return self.part is None and self.config.inferencer.num_shards > 1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing, against processes here and machines elsewhere.

        Raises RunLockedError, and RunKeyMismatchError when another machine made it a run with other settings.
        """
        sync = self.sync
        with self.run.locked(), sync.leased():
            sync.claim(self.identity)  # another machine may have begun in the same moment
            yield

    def take_over(self) -> tuple[Answerer, RunPlan]:
        """Take the seat in this process, make who answers here, and return both it and the plan bound to it.

        Raises RunKeyMismatchError where this machine has other rows or weights.
        """
        self.seat.take()
        answerer = self.answerer.of_plan(self)
        return answerer, answerer.bind(self)


class Answerer(Protocol):
    """Who does the work of a plan in one process; the library's door is one, and its subclasses change single steps."""

    on_progress: Report | None
    on_reference_progress: Report | None
    on_admit: Callable[[int, int, str | None], None] | None
    engine_name: str

    @classmethod
    def of_plan(cls, plan: RunPlan) -> Self:
        """Make one for a plan that was made elsewhere."""

    def bind(self, plan: RunPlan) -> RunPlan:
        """Compare rows and weights with what is here, read rows that did not travel, and claim the run."""

    def load_model_and_tokenizer(self) -> LoadedModel:
        """Load the model, once."""

    def release_model(self) -> None:
        """Let go of the model and give its memory back."""

    def prompt_builder(self) -> PromptBuilder:
        """Return what makes prompts for the loaded model."""

    def token_budget(self) -> TokenBudget:
        """Return the budget that generation starts with."""

    def generate_responses(self, plan: RunPlan) -> LedgerIndex:
        """Answer what is missing of a whole run."""

    def answer_shard(self, plan: RunPlan, shard: Shard) -> None:
        """Answer what is missing of one shard, and score its references."""

    def score_references(self, plan: RunPlan, shard: Shard | None = None) -> ReferenceScore | None:
        """Score the references of the run, or of one shard."""


class Runner(Protocol):
    """Where a plan is answered."""

    def answer(self, plan: RunPlan, report: Report | None = None) -> LedgerIndex:
        """Answer what no ledger of the run has, and return where each row's line is; holds the lock of the place."""
