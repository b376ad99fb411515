"""Which models a fine-tuned one is compared with, and how their runs on the same rows are called."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tasks.core.config import InferencerConfig
from tasks.core.errors import ModelLoadError, ModelNotFoundError
from tasks.core.evaluation.opponents.run_lookup import KEY_LENGTH, search_runs
from tasks.core.models.loading import ModelSpec, identify
from tasks.core.models.trained.champion import current_champion, refuse_changed
from tasks.core.models.trained.registry import read_manifest, slug, why_incomplete
from tasks.core.records import RunIdentity, RunManifest
from tasks.core.runs.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Baseline:
    """The base model of a run's model, the number format to load it in, and the name of its run on the same rows."""

    model_id: str
    revision: str | None
    dtype: str
    run_name: str


def find_baseline(candidate: RunManifest, settings: InferencerConfig) -> Baseline | None:
    """Find the base of the model that answered; None when that model is no fine-tuned one.

    The run's name holds the start of its run key, so that it changes with the rows
    and settings, and stays the same for the next model that is compared on the same rows. It answers in the
    candidate's number format: a full fine-tuning may hold other numbers than its base, and both must have the same.
    """
    model_id, revision = _base_of(candidate)
    if model_id is None:
        return None
    dtype = candidate.identity.model.dtype
    model = identify(replace(ModelSpec.of_answering(settings, model_id, revision), dtype=dtype))
    identity = candidate.identity.model_copy(update={"model": model})
    return Baseline(model_id, revision, dtype, _run_name(slug(model_id), candidate, identity))


@dataclass(frozen=True, slots=True)
class Champion:
    """The promoted model, the number format to load it in, and its run on the same rows or that run's name."""

    model_id: str
    dtype: str
    run_name: str
    finished: RunManifest | None


def find_champion(
    candidate: RunManifest, settings: InferencerConfig, *, models_dir: Path, runs_dir: Path
) -> Champion | None:
    """Find the promoted model, and its answers to the candidate's rows with the same settings if they are there.

    None when nothing is promoted. Raises ModelNotFoundError when the promoted model's files are gone, ModelLoadError
    when they have changed, or when the history of promotions does not agree.
    """
    promoted = current_champion(models_dir)
    if promoted is None:
        return None
    name = promoted.run_name
    model_id = str(models_dir / name)
    reason = why_incomplete(models_dir / name) if (models_dir / name).is_dir() else "its directory is gone"
    if reason is not None:
        raise ModelNotFoundError(
            f"the promoted model {model_id} cannot be compared: {reason}",
            "put it back, promote another one (`tuneproof promote RUN --force --reason TEXT`), or set "
            "pipeline.compare_with_champion = false",
        )
    refuse_changed(models_dir, promoted)
    dtype = candidate.identity.model.dtype
    model = identify(replace(ModelSpec.of_answering(settings, model_id, None), dtype=dtype))
    identity = candidate.identity.model_copy(update={"model": model})
    run_name = _run_name(slug(name), candidate, identity)
    found = [
        manifest
        for run in search_runs(runs_dir, lambda manifest: manifest.run_key == identity.run_key)
        if (manifest := RunDir(run.path).finished_manifest()) is not None
    ]
    # A model that was trained again can have the same weights: the champion's own run comes first.
    found.sort(key=lambda manifest: manifest.identity.model.model_id != model_id)
    if found:
        return Champion(model_id, dtype, found[0].run_name, found[0])
    return Champion(model_id, dtype, run_name, None)


def _run_name(model: str, candidate: RunManifest, identity: RunIdentity) -> str:
    return f"{model}-{slug(candidate.dataset_id)}-{identity.run_key[:KEY_LENGTH]}"


def _base_of(candidate: RunManifest) -> tuple[str | None, str | None]:
    model = candidate.identity.model
    try:
        manifest = read_manifest(Path(model.model_id))
    except (ModelNotFoundError, ModelLoadError):
        return model.base_model_id, None
    return manifest.base_model_id, manifest.base_model_revision
