"""From the section [inferencer] to what a plan has: columns, generation settings, run name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.core.config import InferencerConfig, given_markers
from tasks.core.config.changes import changes_of
from tasks.core.records import GenerationSettings, ModelIdentity, RunIdentity
from tasks.core.runs.rows import RunRows

if TYPE_CHECKING:
    from tasks.core.data.columns import ColumnMapping


def column_mapping(settings: InferencerConfig) -> ColumnMapping:
    """Return which columns are read; the reference column is required only when a person named it."""
    from tasks.core.data.columns import ColumnMapping

    is_named = "ground_truth_column" in settings.model_fields_set
    return ColumnMapping.of(settings.model_dump(), require_reference=is_named)


def generation_settings(settings: InferencerConfig) -> GenerationSettings:
    """Return what shapes an answer, as the section declares it; settings of the other decoding mode are left out."""
    given, defaults = settings.model_dump(mode="json"), type(settings)().model_dump(mode="json")
    is_used = {None: True, "sampling": settings.samples, "beams": settings.num_beams > 1}
    values: dict[str, Any] = {}
    for key, changes in changes_of(type(settings)).items():
        if changes.effect != "answers" or changes.within is not None or key in RunIdentity.model_fields:
            continue
        if is_used[changes.decoding] and not (changes.came_later and given[key] == defaults[key]):
            values[key] = given[key]
        elif not changes.came_later:
            values[key] = changes.unused
    values |= {"do_sample": settings.samples, "thought_markers": given_markers(settings.thought_markers)}
    named = {key: value for key, value in values.items() if key in GenerationSettings.model_fields}
    return GenerationSettings.model_validate(
        {**named, "others": {key: value for key, value in values.items() if key not in named}}
    )


def run_identity(
    settings: InferencerConfig, model: ModelIdentity, rows: RunRows, generation: GenerationSettings
) -> RunIdentity:
    """Return all that can change a published answer to these rows."""
    return RunIdentity(
        model=model,
        rows_sha256=rows.rows_sha256,
        row_count=len(rows),
        generation=generation,
        max_sequence_length=settings.max_sequence_length,
        long_prompts=settings.long_prompts,
        chat_template_kwargs=settings.chat_template_kwargs or {},
    )


def model_run_names(settings: InferencerConfig) -> tuple[str, ...]:
    """Return the names to search a run's model by: with prefix and suffix, as training has it, then bare."""
    name = settings.run_name
    return () if name is None else tuple(dict.fromkeys((settings.full_run_name(name), name)))


def run_name(settings: InferencerConfig, given: str | None, model_id: str) -> str:
    """Return the run's directory name: given, configured, or `<model>-<dataset>`, with prefix and suffix."""
    from tasks.core.models.trained.registry import check_run_name, data_slug, made_up_name, slug

    name = given or settings.run_name
    if name is None:
        name = f"{slug(model_id)}-{data_slug(settings.required_testing_data_id)}"
        return made_up_name(name, settings.run_name_prefix, settings.run_name_suffix)
    return check_run_name(f"{settings.run_name_prefix}{name}{settings.run_name_suffix}")
