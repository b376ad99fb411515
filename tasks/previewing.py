"""Previews of training and inference: what their first rows look like to the model. Loads tokenizers, no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.config import Config, FineTunerConfig, InferencerConfig
from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.data.sources import described_data
from tasks.core.data.sources import training_rows as learnt_rows
from tasks.core.errors import ConfigError, ModelNotFoundError
from tasks.core.models.context_length import context_length_of, possible_length
from tasks.core.models.loading import ModelSpec, load_tokenizer
from tasks.core.models.locating import locate
from tasks.core.prompts.chat_template import set_template
from tasks.core.prompts.preview import Preview, inference_rows, template_facts, training_rows
from tasks.core.prompts.tokens import PromptBuilder
from tasks.core.training.methods.catalogue import method_of
from tasks.inferencer import Inferencer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.core.records import Example


_ROWS_THAT_DECIDE = 1000


def preview(config: Config, rows: int) -> tuple[Preview, ...]:
    """Preview each section that names data: what is learnt, then what is asked. Raises a TuneproofError."""
    found = []
    if config.fine_tuner.training_data_id is not None:
        found.append(preview_training(config.fine_tuner, rows))
    if config.inferencer.testing_data_id is not None:
        found.append(_preview_inference(config, rows, after_training=bool(found)))
    if not found:
        raise ConfigError(
            "neither [fine_tuner] training_data_id nor [inferencer] testing_data_id is set",
            "name the data of at least one of them; there is nothing to preview else",
        )
    return tuple(found)


def preview_training(settings: FineTunerConfig, rows: int) -> Preview:
    """Preview the first training rows with what is learnt of them."""
    spec = _base_spec(settings)
    tokenizer = load_tokenizer(spec)
    context = context_length_of(spec)
    most_tokens = possible_length(context, max_sequence_length=settings.max_sequence_length)
    builder = PromptBuilder.for_learning(tokenizer, settings, most_tokens)
    facts = [("model", settings.base_model_id), ("data", described_data(settings.required_training_data_id))]
    facts += [("learnt", "answers" if settings.train_on_responses_only else "prompts and answers")]
    facts += _system_prompt(settings)
    facts += template_facts(builder, tokenizer, _source(settings), _config_dir(spec))
    if builder.thinking.may_think:
        facts.append(("thoughts", "rows without any are learnt behind a prompt that asks for none"))
    found = examples(learnt_rows(settings, rows), ColumnMapping.of(settings.model_dump()))
    return Preview("training", tuple(facts), training_rows(builder, tokenizer, found, rows))


def _preview_inference(config: Config, rows: int, *, after_training: bool) -> Preview:
    """Preview what the model is asked that the training gives, where there is one, else the one that is there."""
    settings = config.inferencer
    inferencer = Inferencer(config)
    is_trained = after_training and settings.model is None
    spec, name = (
        _base_spec(config.fine_tuner),
        f"the one that fine-tuning {config.fine_tuner.base_model_id} gives",
    )
    if not is_trained:
        try:
            spec, name = inferencer.model_spec(), inferencer.discover().chosen.model_id
        except ModelNotFoundError:
            name = f"{config.fine_tuner.base_model_id} (none is fine-tuned yet)"
    tokenizer = load_tokenizer(spec)
    if is_trained:
        _take_trained_template(tokenizer, config.fine_tuner)
    context = context_length_of(spec)
    most_tokens = possible_length(
        context, max_sequence_length=settings.max_sequence_length, max_new_tokens=settings.max_new_tokens
    )
    builder = PromptBuilder.for_asking(tokenizer, settings, most_tokens, context.tokens)
    facts = [("model", name), ("data", described_data(settings.required_testing_data_id))]
    facts += _system_prompt(settings)
    if after_training and _system_prompt(settings) != _system_prompt(config.fine_tuner):
        facts.append(
            ("warning", "training has another system prompt: the model is asked otherwise than it learnt")
        )
    facts += template_facts(builder, tokenizer, _source(settings), _config_dir(spec))
    found: Iterator[Example] = inferencer.examples(inferencer.load_dataset())
    return Preview("inference", tuple(facts), inference_rows(builder, tokenizer, found, rows))


def _take_trained_template(tokenizer: PreTrainedTokenizerBase, settings: FineTunerConfig) -> None:
    """Give the tokenizer the template that the trained model will ask with, as its first rows decide."""
    first = min(settings.max_rows or _ROWS_THAT_DECIDE, _ROWS_THAT_DECIDE)
    data = method_of(settings).read(
        settings.model_copy(update={"max_rows": first, "validation_data_id": None}), tokenizer
    )
    if data.template.source is not None:
        set_template(tokenizer, data.template.source)


def _base_spec(settings: FineTunerConfig) -> ModelSpec:
    return replace(ModelSpec.of_base(settings), device="cpu")


def _config_dir(spec: ModelSpec) -> Path | None:
    directory = locate(spec.model_id, spec.revision, with_weights=False).directory
    return directory if directory.is_dir() else None


def _source(settings: FineTunerConfig | InferencerConfig) -> str:
    return "the model's own" if settings.chat_template is None else "the one of the setting chat_template"


def _system_prompt(settings: FineTunerConfig | InferencerConfig) -> list[tuple[str, Any]]:
    if settings.system_prompt_override_text is not None:
        return [("system prompt", f"system_prompt_override_text: {settings.system_prompt_override_text!r}")]
    if settings.system_prompt_column is not None:
        return [("system prompt", f"the column {settings.system_prompt_column!r}")]
    return [("system prompt", "the conversation's own, or none")]
