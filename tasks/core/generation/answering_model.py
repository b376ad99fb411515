"""The model that answers, in this process: found, identified, loaded once, with its prompts and its token budget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.config import Config, InferencerConfig
from tasks.core.generation import settings as from_settings
from tasks.core.generation.runners.isolation import is_isolated
from tasks.core.memory.budget import BudgetStore, TokenBudget
from tasks.core.records import ModelIdentity
from tasks.core.storage.store import Store, is_url, local_copy

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel
    from tasks.core.models.specs import ModelSpec
    from tasks.core.models.trained.discovery import Discovery
    from tasks.core.prompts.tokens import PromptBuilder

logger = logging.getLogger(__name__)


class AnsweringModel:
    """Finds and holds the model of the section [inferencer]; every method may be overridden.

    `model` overrides the section's. Nothing is searched or loaded before it is asked for, and each thing once.
    """

    def __init__(self, config: Config, model: str | None, budget_store: BudgetStore) -> None:
        self.config = config
        self.budget_store = budget_store
        self.on_admit: Callable[[int, int, str | None], None] | None = None
        """Told rows, tokens and the only row's id before each batch."""
        self.engine_name = "unknown"
        """The engine that answers, once it is chosen."""
        self.processes = 1
        """How many processes share the device's memory."""
        self._model_id = model
        self._discovery: Discovery | None = None
        self._loaded: LoadedModel | None = None
        self._identity: ModelIdentity | None = None
        self._model_url: str | None = None
        self._prompts: PromptBuilder | None = None

    @property
    def settings(self) -> InferencerConfig:
        """The section [inferencer]."""
        return self.config.inferencer

    @property
    def models(self) -> Store:
        """Where the fine-tuned models are kept."""
        return Store(self.config.pipeline.models_dir)

    @property
    def runs(self) -> Store:
        """Where the runs are kept."""
        return Store(self.config.pipeline.runs_dir)

    @property
    def generates_in_child(self) -> bool:
        """Whether a child process generates a run without shards: as set, and for `auto` on a CUDA device."""
        return is_isolated(self.settings.isolation, self.settings.device)

    def discover(self) -> Discovery:
        """Find the model that answers, once. Raises ModelNotFoundError naming what was searched."""
        from tasks.core.models.trained.discovery import discover_model

        if self._discovery is None:
            wanted = self._model_id or self.settings.model
            run_names = from_settings.model_run_names(self.settings)
            if wanted is not None and is_url(wanted):
                self._model_url, wanted = wanted, str(local_copy(wanted))
            self._discovery = discover_model(
                model=wanted,
                run_names=run_names,
                hf_user_id=self.settings.hf_user_id,
                models_dir=self.models,
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
        from tasks.core.models.specs import ModelSpec

        chosen, settings = self.discover().chosen, self.settings
        return ModelSpec.of_answering(settings, chosen.model_id, settings.model_revision or chosen.revision)

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

    def share_model(self, other: AnsweringModel) -> None:
        """Let another one of the same model use what is found and loaded here."""
        other._discovery, other._model_url = self._discovery, self._model_url
        other._loaded, other._identity = self._loaded, self._identity

    def prompt_builder(self) -> PromptBuilder:
        """Return the builder of token prompts for the loaded model.

        Prompts are no longer than the model has positions. Raises ConfigError when no prompt can be that short.
        """
        from tasks.core.models.context_length import context_length, possible_length
        from tasks.core.prompts.tokens import PromptBuilder

        if self._prompts is None:
            loaded, settings = self.load_model_and_tokenizer(), self.settings
            context = context_length(loaded.model)
            most_tokens = possible_length(
                context,
                max_sequence_length=settings.max_sequence_length,
                max_new_tokens=settings.max_new_tokens,
            )
            self._prompts = PromptBuilder.for_asking(loaded.tokenizer, settings, most_tokens, context.tokens)
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
