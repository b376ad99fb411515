"""What is answered: the rows, model, settings, place and part of one run, as one record that any process takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tasks.core.config import Config, with_overrides
from tasks.core.generation.runners.seats import ALONE, Seat
from tasks.core.memory.budget import BudgetStore, TokenBudget
from tasks.core.records import Example, ModelIdentity, RunIdentity, RunManifest
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.rows import RunRows, index_rows
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

    def claimed(self) -> RunPlan:
        """Bring what other machines have of the run, and claim it. Raises RunKeyMismatchError where it is another's."""
        self.sync.pull()
        self.sync.claim(self.identity)
        return self

    def take_over(self) -> tuple[Answerer, RunPlan]:
        """Take the seat in this process, make who answers here, and return both it and the plan bound to it.

        Raises RunKeyMismatchError where this machine has other rows or weights.
        """
        self.seat.take()
        answerer = self.seated(self.answerer)
        return answerer, self.bound_to(answerer)

    def seated(self, kind: type[AnyAnswerer]) -> AnyAnswerer:
        """Make one who answers at the seat."""
        # The run's full name is given, so prefix and suffix are in it already.
        own = {"inferencer.run_name_prefix": "", "inferencer.run_name_suffix": ""}
        # Whichever GPU the settings name, a process that has a seat at one sees that one only.
        own |= {} if self.seat.gpu is None else {"inferencer.device": "cuda"}
        # Another machine would answer in the number format that it computes fast in.
        dtype = self.identity.model.dtype
        own |= {"inferencer.dtype": dtype} if dtype in ("float32", "float16", "bfloat16") else {}
        config, model = with_overrides(self.config, own), self.spec.model_id
        made = kind(config, model=model, run_name=self.run_name, budget_store=self.budget_store)
        made.processes = self.seat.processes
        return made

    def bound_to(self, answerer: Answerer) -> RunPlan:
        """Compare the plan with what is here, reading rows that did not travel with it, and claim the run.

        Raises RunKeyMismatchError where rows or weights are others.
        """
        rows, identity = self.rows, self.identity.model_copy(update={"model": answerer.identify()})
        if not rows.are_here:
            dataset = answerer.load_dataset()
            rows = index_rows(lambda: answerer.examples(dataset))
            identity = answerer.run_identity(rows)
        return replace(self, rows=rows, identity=identity, config=answerer.config).claimed()


class Answerer(Protocol):
    """Who does the work of a plan in one process; the library's door is one, and its subclasses change single steps."""

    config: Config
    on_progress: Report | None
    on_reference_progress: Report | None
    on_admit: Callable[[int, int, str | None], None] | None
    engine_name: str
    processes: int

    def __init__(
        self, config: Config, /, *, model: str | None, run_name: str | None, budget_store: BudgetStore | None
    ) -> None: ...

    def identify(self) -> ModelIdentity:
        """Tell which weights answer."""

    def load_dataset(self) -> Any:
        """Open the test data."""

    def examples(self, dataset: Any) -> Iterator[Example]:
        """Map its rows."""

    def run_identity(self, rows: RunRows) -> RunIdentity:
        """Tell all that can change an answer to these rows."""

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

    def publish(self, plan: RunPlan, index: LedgerIndex) -> RunManifest:
        """Write the predictions and the manifest."""

    def answer_again(self, plan: RunPlan) -> RunManifest:
        """Complete another plan with the model that is loaded."""


AnyAnswerer = TypeVar("AnyAnswerer", bound=Answerer)


class Runner(Protocol):
    """Where a plan is answered."""

    def answer(self, plan: RunPlan, report: Report | None = None) -> LedgerIndex:
        """Answer what no ledger of the run has, and return where each row's line is; holds the lock of the place."""
