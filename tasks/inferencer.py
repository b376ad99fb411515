"""Inferencer: from test rows to published predictions, as a plain class that the Prefect tasks use too."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tasks.core.config import Config, as_config, with_overrides
from tasks.core.generation import finishing
from tasks.core.generation import settings as from_settings
from tasks.core.generation.answering_model import AnsweringModel
from tasks.core.generation.plan import Report, RunPlan
from tasks.core.generation.runners.choosing import choose_runner
from tasks.core.generation.runners.here import Here
from tasks.core.generation.runners.isolation import is_isolated
from tasks.core.memory.budget import BudgetStore, FileBudgetStore
from tasks.core.records import Example, GenerationSettings, Message, Prediction, RunIdentity, RunManifest
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.published import read_predictions
from tasks.core.runs.rows import RunRows, index_rows
from tasks.core.runs.shards import Shard
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.core.runs.manifest import ReferenceScore

logger = logging.getLogger(__name__)

PreparedRows = RunPlan
"""An earlier name of what `process_dataset` returns."""


class Inferencer(AnsweringModel):
    """Answers a dataset with a model; every method may be called or overridden on its own.

    `config_manager` is a Config, the path of a TOML file, or None for ./config.toml and defaults. `model` and
    `run_name` override the config's. `run()` does all steps in order:

        discover -> load_dataset -> process_dataset -> load_model_and_tokenizer -> generate_responses -> publish

    Another process that answers a part makes one of the same class, so what a subclass overrides holds there too.
    """

    def __init__(
        self,
        config_manager: Config | Path | str | None = None,
        *,
        model: str | None = None,
        run_name: str | None = None,
        on_progress: Report | None = None,
        budget_store: BudgetStore | None = None,
    ) -> None:
        super().__init__(as_config(config_manager), model, budget_store or FileBudgetStore())
        self.on_progress = on_progress
        self.on_reference_progress: Report | None = None
        """Told how far the scoring of references is."""
        self._run_name = run_name
        self._told_of_columns = False

    @property
    def runs(self) -> Store:
        """Where the runs are kept."""
        return Store(self.config.pipeline.runs_dir)

    @property
    def generates_in_child(self) -> bool:
        """Whether a child process generates a run without shards: as set, and for `auto` on a CUDA device."""
        return is_isolated(self.settings.isolation, self.settings.device)

    # --- what is answered

    def plan(self) -> RunPlan:
        """Read the test data and make the plan of its run. Raises as `load_dataset` and `process_dataset` do."""
        return self.process_dataset(self.load_dataset())

    def load_dataset(self) -> Dataset:
        """Open the test data. Raises DataError."""
        from tasks.core.data.sources import test_rows

        return test_rows(self.settings)

    def process_dataset(self, dataset: Dataset) -> RunPlan:
        """Map the columns, find each row's id and bind the rows to their run directory.

        Raises DataError for a missing column, RunKeyMismatchError when the directory holds other answers.
        """
        rows = index_rows(lambda: self.examples(dataset))
        identity = self.run_identity(rows)
        plan = RunPlan(
            rows,
            identity,
            replace(self.model_spec(), model_id=self.portable_model_id),
            self.config,
            self.run_name(identity),
            self.runs,
            type(self),
            self.budget_store,
        )
        return self._claimed(plan)

    def examples(self, dataset: Dataset) -> Iterator[Example]:
        """Map dataset rows to examples; override it to read other shapes of data."""
        from tasks.core.data.columns import examples

        told, self._told_of_columns = self._told_of_columns, True
        return examples(dataset, from_settings.column_mapping(self.settings), told=told)

    def run_identity(self, rows: RunRows) -> RunIdentity:
        """Return all that can change an answer to these rows; its hash is the run key."""
        return RunIdentity(
            model=self.identify(),
            rows_sha256=rows.rows_sha256,
            row_count=len(rows),
            generation=self.generation_settings(),
            max_sequence_length=self.settings.max_sequence_length,
            long_prompts=self.settings.long_prompts,
            chat_template_kwargs=self.settings.chat_template_kwargs or {},
        )

    def generation_settings(self) -> GenerationSettings:
        """Return what shapes an answer, from the section; settings of the other decoding mode are left out."""
        return from_settings.generation_settings(self.settings)

    def run_name(self, identity: RunIdentity) -> str:
        """Return the run's directory name: given, configured, or `<model>-<dataset>`, with prefix and suffix."""
        return from_settings.run_name(self.settings, self._run_name, identity.model.model_id)

    # --- a plan that was made elsewhere

    @classmethod
    def of_plan(cls, plan: RunPlan) -> Self:
        """Make one that works at a plan's seat."""
        # The run's full name is given, so prefix and suffix are in it already.
        own = {"inferencer.run_name_prefix": "", "inferencer.run_name_suffix": ""}
        # Whichever GPU the settings name, a process that has a seat at one sees that one only.
        own |= {} if plan.seat.gpu is None else {"inferencer.device": "cuda"}
        # Another machine would answer in the number format that it computes fast in.
        dtype = plan.identity.model.dtype
        own |= {"inferencer.dtype": dtype} if dtype in ("float32", "float16", "bfloat16") else {}
        made = cls(
            with_overrides(plan.config, own),
            model=plan.spec.model_id,
            run_name=plan.run_name,
            budget_store=plan.budget_store,
        )
        made.processes = plan.seat.processes
        return made

    def bind(self, plan: RunPlan) -> RunPlan:
        """Compare a plan with what is here, reading rows that did not travel with it, and claim the run.

        Raises RunKeyMismatchError where rows or weights are others.
        """
        rows, identity = plan.rows, plan.identity.model_copy(update={"model": self.identify()})
        if not rows.are_here:
            dataset = self.load_dataset()
            rows = index_rows(lambda: self.examples(dataset))
            identity = self.run_identity(rows)
        return self._claimed(replace(plan, rows=rows, identity=identity, config=self.config))

    def _claimed(self, plan: RunPlan) -> RunPlan:
        plan.sync.pull()
        plan.sync.claim(plan.identity)
        return plan

    # --- the steps of a plan

    def generate_responses(self, prepared: RunPlan) -> LedgerIndex:
        """Answer every row that no ledger of the run has; rows that are there are kept. Holds the run's lock.

        The model may live and die in a child process, see `generates_in_child`; with num_shards above 1 the rows
        are answered in shards. Raises RunLockedError when another process writes the same run,
        StorageError when the disk is full, TypeError for a dataset that process_dataset has not prepared.
        """
        if not isinstance(prepared, RunPlan):
            raise TypeError(
                f"generate_responses takes what process_dataset(dataset) returns, not a {type(prepared).__name__}"
            )
        return self._answer(prepared, self.on_progress)

    def answer_shard(self, prepared: RunPlan, shard: Shard) -> None:
        """Answer the rows of one shard and score its references, in the shard's own directory.

        Loads no model when nothing is missing. Raises RunLockedError when the shard is being answered.
        """
        self._answer(replace(prepared, part=shard), None)

    def _answer(self, plan: RunPlan, report: Report | None) -> LedgerIndex:
        runner = choose_runner(plan, self)
        if not isinstance(runner, Here):
            self.release_model()  # its memory is for the process that answers
        return runner.answer(plan, report)

    def score_references(self, prepared: RunPlan, shard: Shard | None = None) -> ReferenceScore | None:
        """Return the perplexity that the model gives the references; None when it is not asked for.

        With `shard` only that of its rows. Without, what all shards measured is joined, and no model is needed.
        """
        return finishing.score_references(prepared, self, shard)

    def publish(self, prepared: RunPlan, index: LedgerIndex) -> RunManifest:
        """Write the predictions in dataset order, then the manifest. Raises StorageError."""
        return finishing.publish_run(prepared, self, index)

    def finished(self, prepared: RunPlan) -> RunManifest | None:
        """Return the manifest when all of this was done before and the files are untouched, else None.

        References that are wanted and were not scored make a run unfinished; its answers stay.
        """
        return finishing.finished_manifest(prepared)

    # --- all of it

    def infer(self) -> RunManifest:
        """Do all steps, or none of the expensive ones when the run is already there; return its manifest."""
        return self.complete(self.plan())

    def complete(self, prepared: RunPlan) -> RunManifest:
        """Do what is left of a plan; return its manifest."""
        manifest = self.finished(prepared)
        if manifest is not None:
            told = "%s is complete (%d rows): nothing to generate"
            logger.info(told, prepared.run.path, manifest.row_count)
            return manifest
        return self.publish(prepared, self.generate_responses(prepared))

    def answer_again(self, prepared: RunPlan) -> RunManifest:
        """Complete a plan that others' settings were made for, such as a repeat, with the model that is loaded here."""
        other = self.of_plan(prepared)
        self.share_model(other)
        try:
            return other.complete(other.bind(prepared))
        finally:
            other.release_model()

    def run(self) -> list[Prediction]:
        """Do all steps and return the predictions in dataset order."""
        manifest = self.infer()
        return list(read_predictions(self.runs.local / manifest.run_name / manifest.predictions_path))

    def stream_inference(
        self, prompt: str | Iterable[Message], *, system: str | None = None
    ) -> Iterator[str]:
        """Yield the answer to one question (or conversation) piece by piece, as it is generated."""
        from tasks.core.generation.streaming import stream_answer

        if isinstance(prompt, str):
            example = Example("stream-0", prompt, system or self.settings.system_prompt_override_text)
        else:
            messages = tuple(prompt)
            example = Example("stream-0", messages[-1].content if messages else "", messages=messages)
        model, asked = self.load_model_and_tokenizer(), self.prompt_builder().build(example)
        if asked.truncated_tokens:
            logger.warning(
                "the question was cut on the left by %d tokens: with the answer it is longer than the model or "
                "max_sequence_length allows",
                asked.truncated_tokens,
            )
        yield from stream_answer(model, asked, self.generation_settings())


__all__ = ["Inferencer", "PreparedRows"]
