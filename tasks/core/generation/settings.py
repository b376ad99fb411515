"""From the section [inferencer] to what a plan has: model to load, columns, generation settings, run name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.config import InferencerConfig, given_markers
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    from tasks.core.data.columns import ColumnMapping
    from tasks.core.models.loading import ModelSpec
    from tasks.core.models.trained.discovery import Candidate


def model_spec(settings: InferencerConfig, chosen: Candidate) -> ModelSpec:
    """Return what to load: the chosen model with the section's dtype, quantisation and device."""
    from tasks.core.models.loading import ModelSpec

    return ModelSpec.of_answering(settings, chosen.model_id, settings.model_revision or chosen.revision)


def column_mapping(settings: InferencerConfig) -> ColumnMapping:
    """Return which columns are read; the reference column is required only when a person named it."""
    from tasks.core.data.columns import ColumnMapping

    is_named = "ground_truth_column" in settings.model_fields_set
    return ColumnMapping.of(settings.model_dump(), require_reference=is_named)


def generation_settings(settings: InferencerConfig) -> GenerationSettings:
    """Return what shapes an answer; settings of the other decoding mode are left out."""
    sampled = settings.samples
    beams = settings.num_beams > 1
    return GenerationSettings(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        do_sample=sampled,
        temperature=settings.temperature if sampled else 1.0,
        top_k=settings.top_k if sampled else None,
        top_p=settings.top_p if sampled else None,
        min_p=settings.min_p if sampled else None,
        repetition_penalty=settings.repetition_penalty,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty if beams else None,
        early_stopping=settings.early_stopping and beams,
        stop_strings=settings.stop_strings,
        seed=settings.seed if sampled else 0,
        thought_markers=given_markers(settings.thought_markers),
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
