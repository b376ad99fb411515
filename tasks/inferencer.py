"""Inferencer: from test rows to published predictions, the library's door; a subclass changes the steps it needs to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.config import Config, as_config
from tasks.core.generation import finishing
from tasks.core.generation import settings as from_settings
from tasks.core.generation.answering_model import AnsweringModel
from tasks.core.generation.plan import Report, RunPlan
from tasks.core.generation.runners.choosing import answer_plan
from tasks.core.memory.budget import BudgetStore, FileBudgetStore
from tasks.core.records import Example, GenerationSettings, Message, Prediction, RunIdentity, RunManifest
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.published import read_predictions
from tasks.core.runs.rows import RunRows, index_rows
from tasks.core.runs.shards import Shard

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.core.runs.manifest import ReferenceScore

logger = logging.getLogger(__name__)


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

    # --- what is answered

    def load_dataset(self) -> Dataset:
        """Open the test data. Raises DataError."""
        from tasks.core.data.sources import test_rows

        return test_rows(self.settings)

    def examples(self, dataset: Dataset) -> Iterator[Example]:
        """Map dataset rows to examples; override it to read other shapes of data."""
        from tasks.core.data.columns import examples

        told, self._told_of_columns = self._told_of_columns, True
        return examples(dataset, from_settings.column_mapping(self.settings), told=told)

    def generation_settings(self) -> GenerationSettings:
        """Return what shapes an answer, from the section; settings of the other decoding mode are left out."""
        return from_settings.generation_settings(self.settings)

    def run_identity(self, rows: RunRows) -> RunIdentity:
        """Return all that can change an answer to these rows; its hash is the run key."""
        return from_settings.run_identity(self.settings, self.identify(), rows, self.generation_settings())

    def run_name(self, identity: RunIdentity) -> str:
        """Return the run's directory name: given, configured, or `<model>-<dataset>`, with prefix and suffix."""
        return from_settings.run_name(self.settings, self._run_name, identity.model.model_id)

    def process_dataset(self, dataset: Dataset) -> RunPlan:
        """Map the columns, find each row's id and bind the rows to their run directory.

        Raises DataError for a missing column, RunKeyMismatchError when the directory holds other answers.
        """
        rows = index_rows(lambda: self.examples(dataset))
        identity = self.run_identity(rows)
        spec = replace(self.model_spec(), model_id=self.portable_model_id)
        place = self.run_name(identity), self.runs
        return RunPlan(rows, identity, spec, self.config, *place, type(self), self.budget_store).claimed()

    def plan(self) -> RunPlan:
        """Read the test data and make the plan of its run. Raises as `load_dataset` and `process_dataset` do."""
        return self.process_dataset(self.load_dataset())

    # --- the steps of a plan

    def generate_responses(self, prepared: RunPlan) -> LedgerIndex:
        """Answer every row that no ledger of the run has; rows that are there are kept. Holds the run's lock.

        The model may live and die in a child process, see `generates_in_child`; with num_shards above 1 the rows
        are answered in shards. Raises RunLockedError when another process writes the same run,
        StorageError when the disk is full, TypeError for a dataset that process_dataset has not prepared.
        """
        return answer_plan(prepared, self, self.on_progress)

    def answer_shard(self, prepared: RunPlan, shard: Shard) -> None:
        """Answer the rows of one shard and score its references, in the shard's own directory.

        Loads no model when nothing is missing. Raises RunLockedError when the shard is being answered.
        """
        answer_plan(replace(prepared, part=shard), self, None)

    def score_references(self, prepared: RunPlan, shard: Shard | None = None) -> ReferenceScore | None:
        """Return the perplexity that the model gives the references; None when it is not asked for.

        With `shard` only that of its rows. Without, what all shards measured is joined, and no model is needed.
        """
        return finishing.score_references(prepared, self, shard)

    def publish(self, prepared: RunPlan, index: LedgerIndex) -> RunManifest:
        """Write the predictions in dataset order, then the manifest. Raises StorageError."""
        return finishing.publish_run(prepared, self, index)

    def finished(self, prepared: RunPlan) -> RunManifest | None:
        """Return the manifest when all of this was done before and the files are untouched, else None."""
        return finishing.finished_manifest(prepared)

    # --- all of it

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
        other = prepared.seated(type(self))
        self.share_model(other)
        try:
            return other.complete(prepared.bound_to(other))
        finally:
            other.release_model()

    def infer(self) -> RunManifest:
        """Do all steps, or none of the expensive ones when the run is already there; return its manifest."""
        return self.complete(self.plan())

    def run(self) -> list[Prediction]:
        """Do all steps and return the predictions in dataset order."""
        manifest = self.infer()
        return list(read_predictions(self.runs.local / manifest.run_name / manifest.predictions_path))

    def stream_inference(
        self, prompt: str | Iterable[Message], *, system: str | None = None
    ) -> Iterator[str]:
        """Yield the answer to one question (or conversation) piece by piece, as it is generated."""
        from tasks.core.generation.streaming import example_of, stream_answer

        example = example_of(prompt, system or self.settings.system_prompt_override_text)
        model, asked = self.load_model_and_tokenizer(), self.prompt_builder().build(example)
        yield from stream_answer(model, asked, self.generation_settings())
