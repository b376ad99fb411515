"""Inferencer: from test rows to published predictions, as a plain class that the Prefect tasks use too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import inference_settings
from tasks.core.config import Config, InferencerConfig, as_config
from tasks.core.data.sources import described_data
from tasks.core.memory.budget import BudgetStore, FileBudgetStore, TokenBudget
from tasks.core.models.trained.model_store import bring_wanted
from tasks.core.records import (
    Example,
    GenerationSettings,
    Message,
    ModelIdentity,
    Prediction,
    RunIdentity,
    RunManifest,
)
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.published import publish, read_predictions
from tasks.core.runs.rows import RunRows, index_rows
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.shards import Shard
from tasks.core.runs.sync import RunSync
from tasks.core.storage.store import Store, is_url, local_copy

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.core.models.loading import LoadedModel, ModelSpec
    from tasks.core.models.trained.discovery import Discovery
    from tasks.core.prompts.tokens import PromptBuilder
    from tasks.core.runs.manifest import ReferenceScore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRows:
    """Rows bound to a run: what is asked, of which model, with which settings, and where it is kept."""

    rows: RunRows
    identity: RunIdentity
    run: RunDir
    run_name: str
    sync: RunSync

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing, against processes here and machines elsewhere.

        Raises RunLockedError, and RunKeyMismatchError when another machine made it a run with other settings.
        """
        with self.run.locked(), self.sync.leased():
            self.sync.claim(self.identity)  # another machine may have begun in the same moment
            yield


class Inferencer:
    """Answers a dataset with a model; every method may be called or overridden on its own.

    `config_manager` is a Config, the path of a TOML file, or None for ./config.toml and defaults. `model` and
    `run_name` override the config's. `run()` does all steps in order:

        discover -> load_dataset -> process_dataset -> load_model_and_tokenizer -> generate_responses -> publish
    """

    def __init__(
        self,
        config_manager: Config | Path | str | None = None,
        *,
        model: str | None = None,
        run_name: str | None = None,
        on_progress: Callable[[GenerationProgress], None] | None = None,
        budget_store: BudgetStore | None = None,
    ) -> None:
        self.config = as_config(config_manager)
        self._model_id = model
        self._run_name = run_name
        self.on_progress = on_progress
        self.budget_store = budget_store or FileBudgetStore()
        self.on_admit: Callable[[int, int, str | None], None] | None = None
        """Told rows, tokens and the only row's id before each batch."""
        self.engine_name = "unknown"
        """The engine that answers, once it is chosen."""
        self.processes = 1
        """How many processes share the device's memory."""
        self._discovery: Discovery | None = None
        self._loaded: LoadedModel | None = None
        self._identity: ModelIdentity | None = None
        self._model_url: str | None = None
        self._prompts: PromptBuilder | None = None
        self._told_of_columns = False

    @property
    def settings(self) -> InferencerConfig:
        """The section [inferencer]."""
        return self.config.inferencer

    @property
    def generates_in_child(self) -> bool:
        """Whether a child process generates a run without shards: as set, and for `auto` on a CUDA device."""
        from tasks.core.generation.runners.isolation import is_isolated

        return is_isolated(self.settings.isolation, self.settings.device)

    def discover(self) -> Discovery:
        """Find the model that answers, once. Raises ModelNotFoundError naming what was searched."""
        from tasks.core.models.trained.discovery import discover_model

        if self._discovery is None:
            wanted = self._model_id or self.settings.model
            run_names = inference_settings.model_run_names(self.settings)
            if wanted is not None and is_url(wanted):
                self._model_url, wanted = wanted, str(local_copy(wanted))
            else:
                bring_wanted(self.models, wanted, run_names)
            self._discovery = discover_model(
                model=wanted,
                run_names=run_names,
                hf_user_id=self.settings.hf_user_id,
                models_dir=self.models.local,
            )
            chosen = Path(self._discovery.chosen.model_id)
            if self.models.is_remote and chosen.is_relative_to(self.models.local):
                self._model_url = self.models.url_of(chosen)
        return self._discovery

    @property
    def portable_model_id(self) -> str:
        """The model as other machines find it: its URL where it was brought from one."""
        chosen = self.discover().chosen.model_id
        return self._model_url or chosen

    def model_spec(self) -> ModelSpec:
        """Return what to load: the discovered model with the section's dtype, quantisation and device."""
        return inference_settings.model_spec(self.settings, self.discover().chosen)

    def identify(self) -> ModelIdentity:
        """Return which weights answer, without loading them."""
        from tasks.core.models.loading import identify

        if self._identity is None:
            self._identity = self._named(identify(self.model_spec()))
        return self._identity

    def _named(self, identity: ModelIdentity) -> ModelIdentity:
        """Give the model its lasting name: the URL that it was brought from, not where it lies in the cache."""
        if self._model_url is None:
            return identity
        names = {"model_id": self._model_url}
        if identity.adapter_id is not None:
            names["adapter_id"] = self._model_url
        return identity.model_copy(update=names)

    def load_model_and_tokenizer(self) -> LoadedModel:
        """Load the discovered model, once. Raises ModelLoadError or ModelNotFoundError."""
        from tasks.core.models.loading import load_model_and_tokenizer

        if self._loaded is None:
            self._loaded = load_model_and_tokenizer(self.model_spec())
            self._identity = self._named(self._loaded.identity)
        return self._loaded

    def release_model(self) -> None:
        """Let go of the model and give its memory back."""
        from tasks.core.memory.device_memory import release

        device = self._loaded.device if self._loaded else "cpu"
        self._loaded = self._prompts = None
        release(device)

    def load_dataset(self) -> Dataset:
        """Open the test data. Raises DataError."""
        from tasks.core.data.sources import test_rows

        return test_rows(self.settings)

    def process_dataset(self, dataset: Dataset) -> PreparedRows:
        """Map the columns, find each row's id and bind the rows to their run directory.

        Raises DataError for a missing column, RunKeyMismatchError when the directory holds other answers.
        """
        rows = index_rows(lambda: self.examples(dataset))
        identity = self.run_identity(rows)
        name = self.run_name(identity)
        run = RunDir(self.runs.local / name)
        sync = RunSync(self.runs, run, self.config.pipeline.sync_seconds)
        sync.pull()
        sync.claim(identity)
        return PreparedRows(rows, identity, run, name, sync)

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

    def examples(self, dataset: Dataset) -> Iterator[Example]:
        """Map dataset rows to examples; override it to read other shapes of data."""
        from tasks.core.data.columns import examples

        told, self._told_of_columns = self._told_of_columns, True
        return examples(dataset, inference_settings.column_mapping(self.settings), told=told)

    def generation_settings(self) -> GenerationSettings:
        """Return what shapes an answer, from the section; settings of the other decoding mode are left out."""
        return inference_settings.generation_settings(self.settings)

    def run_name(self, identity: RunIdentity) -> str:
        """Return the run's directory name: given, configured, or `<model>-<dataset>`, with prefix and suffix."""
        return inference_settings.run_name(self.settings, self._run_name, identity.model.model_id)

    def prompt_builder(self) -> PromptBuilder:
        """Return the builder of token prompts for the loaded model.

        Prompts are no longer than the model has positions. Raises ConfigError when no prompt can be that short.
        """
        from tasks.core.models.context_length import context_length, possible_length
        from tasks.core.prompts.tokens import PromptBuilder

        if self._prompts is None:
            loaded, settings = self.load_model_and_tokenizer(), self.settings
            context = context_length(loaded.model)
            self._prompts = PromptBuilder(
                loaded.tokenizer,
                max_sequence_length=possible_length(
                    context,
                    max_sequence_length=settings.max_sequence_length,
                    max_new_tokens=settings.max_new_tokens,
                ),
                reserve_tokens=settings.max_new_tokens,
                trained_tokens=context.tokens,
                long_prompts=settings.long_prompts,
                chat_template_kwargs=settings.chat_template_kwargs,
            )
            self._tell_about_template(self._prompts)
        return self._prompts

    def _tell_about_template(self, prompts: PromptBuilder) -> None:
        """Say what prompts do with thoughts, and warn where they are not those that the model was trained on."""
        if prompts.thinking.in_words is not None:
            logger.info("thoughts: %s", prompts.thinking.in_words)
        if (
            prompts.template.variables
            and self._is_fine_tuned()
            and prompts.template.asks_otherwise_by_variables
        ):
            logger.warning(
                "inferencer.chat_template_kwargs = %s makes other prompts than %s was trained on; its answers may "
                "suffer. Leave it out to ask as in training.",
                *(prompts.template.variables, self.portable_model_id),
            )

    def _is_fine_tuned(self) -> bool:
        from tasks.core.models.specs import find_source
        from tasks.core.models.trained.registry import MANIFEST_NAME

        source = find_source(self.model_spec(), with_weights=False)
        return ((source.adapter or source.base).directory / MANIFEST_NAME).is_file()

    def generate_responses(self, prepared: PreparedRows) -> LedgerIndex:
        """Answer every row that no ledger of the run has; rows that are there are kept. Holds the run's lock.

        The model may live and die in a child process, see `generates_in_child`; with num_shards above 1 the rows
        are answered in shards. Raises RunLockedError when another process writes the same run,
        StorageError when the disk is full, TypeError for a dataset that process_dataset has not prepared.
        """
        if not isinstance(prepared, PreparedRows):
            raise TypeError(
                f"generate_responses takes what process_dataset(dataset) returns, not a {type(prepared).__name__}"
            )
        if self.settings.num_shards > 1:
            from tasks.shard_work import answer_in_shards

            return answer_in_shards(self, prepared)
        if self.generates_in_child:
            from tasks.isolated_inference import generate_in_child

            return generate_in_child(self, prepared)
        from tasks.answering import answer_here

        with prepared.locked():
            return answer_here(self, prepared)

    def answer_shard(self, prepared: PreparedRows, shard: Shard) -> None:
        """Answer the rows of one shard and score its references, in the shard's own directory.

        Loads no model when nothing is missing. Raises RunLockedError when the shard is being answered.
        """
        from tasks import answering

        answering.answer_shard(self, prepared, shard)

    def token_budget(self) -> TokenBudget:
        """Return the budget that generation starts with."""
        from tasks.core.generation.answering import starting_budget

        budget = starting_budget(
            self.load_model_and_tokenizer(),
            batch_size=self.settings.batch_size,
            max_batch_tokens=self.settings.max_batch_tokens,
            store=self.budget_store,
            processes=self.processes,
        )
        budget.on_admit = self.on_admit
        return budget

    def score_references(self, prepared: PreparedRows, shard: Shard | None = None) -> ReferenceScore | None:
        """Return the perplexity that the model gives the references; None when it is not asked for.

        With `shard` only that of its rows. Without, what all shards measured is joined, and no model is needed.
        """
        from tasks import answering

        return answering.score_references(self, prepared, shard)

    def publish(self, prepared: PreparedRows, index: LedgerIndex) -> RunManifest:
        """Write the predictions in dataset order, then the manifest. Raises StorageError."""
        from tasks.core.runs.manifest import write_manifest

        with prepared.locked():
            published = publish(
                prepared.run,
                prepared.rows,
                index,
                model=prepared.identity.model,
                settings=prepared.identity.generation,
            )
            references = self.score_references(prepared)
            manifest = write_manifest(
                prepared.run,
                prepared.identity,
                published,
                run_name=prepared.run_name,
                dataset_id=described_data(self.settings.required_testing_data_id),
                dataset_split=self.settings.testing_data_split,
                dataset_revision=self.settings.testing_data_revision,
                references=references,
            )
            prepared.sync.push_published()
            return manifest

    def finished(self, prepared: PreparedRows) -> RunManifest | None:
        """Return the manifest when all of this was done before and the files are untouched, else None.

        References that are wanted and were not scored make a run unfinished; its answers stay.
        """
        from tasks import answering

        manifest = prepared.run.finished_manifest_of(prepared.identity.run_key)
        if manifest is None or not self.settings.score_references:
            return manifest
        return manifest if answering.has_references(prepared.run, manifest) else None

    def infer(self) -> RunManifest:
        """Do all steps, or none of the expensive ones when the run is already there; return its manifest."""
        prepared = self.process_dataset(self.load_dataset())
        manifest = self.finished(prepared)
        if manifest is not None:
            logger.info(
                "%s is complete (%d rows): nothing to generate", prepared.run.path, manifest.row_count
            )
            return manifest
        return self.publish(prepared, self.generate_responses(prepared))

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

    @property
    def models(self) -> Store:
        """Where the fine-tuned models are kept."""
        return Store(self.config.pipeline.models_dir)

    @property
    def runs(self) -> Store:
        """Where the runs are kept."""
        return Store(self.config.pipeline.runs_dir)


__all__ = ["Inferencer", "PreparedRows"]
