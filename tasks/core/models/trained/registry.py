"""The fine-tuned models under `models/`: their names, manifests, and which of them are complete."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from tasks.core.errors import ConfigError, ModelLoadError, ModelNotFoundError, first_line
from tasks.core.files import write_atomically
from tasks.core.models.checking import weight_paths
from tasks.core.models.digests import weights_sha256
from tasks.core.models.locating import missing_base
from tasks.core.models.packaged import package_model_dir
from tasks.core.models.trained.champion import promoted_run
from tasks.core.records import ModelManifest
from tasks.core.run_names import PROMOTED, check_run_name, data_slug, made_up_name, slug

__all__ = [
    "PROMOTED",
    "ModelEntry",
    "check_run_name",
    "data_slug",
    "list_models",
    "made_up_name",
    "model_dir",
    "package_model_dir",
    "promoted_run",
    "read_manifest",
    "slug",
    "weights_sha256",
    "why_incomplete",
    "write_manifest",
]

MANIFEST_NAME = "tuneproof_manifest.json"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One directory under `models/`. `reason` says why it is not complete; `manifest` is None without one.

    `ordered_at` is what newer and older go by; `changed_at` is what a clock said, which may have gone back.
    """

    run_name: str
    path: Path
    manifest: ModelManifest | None
    reason: str | None
    changed_at: datetime
    ordered_at: datetime

    @property
    def complete(self) -> bool:
        """Whether the model can be loaded: manifest, configuration, weights and base are there."""
        return self.reason is None


def model_dir(models_dir: Path, run_name: str) -> Path:
    """Where the model of a run is written. Neither the name nor a symbolic link can lead out of `models_dir`.

    Raises ConfigError for a name that is bad or reserved, or a link that points elsewhere.
    """
    check_run_name(run_name)
    directory = models_dir / run_name
    if not directory.resolve().is_relative_to(models_dir.resolve()):
        raise ConfigError(
            f"{directory} is a link to {directory.resolve()}, outside of {models_dir}; nothing is written there",
            "choose another run_name or remove the link",
        )
    return directory


def write_manifest(directory: Path, manifest: ModelManifest) -> Path:
    """Write the manifest whole or not at all; call it last, its presence means a complete model."""
    path = directory / MANIFEST_NAME
    write_atomically(path, manifest.model_dump_json(indent=2) + "\n")
    return path


def read_manifest(directory: Path) -> ModelManifest:
    """Read a model's manifest; ModelNotFoundError when absent, ModelLoadError when damaged."""
    path = directory / MANIFEST_NAME
    try:
        return ModelManifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(
            f"{directory} has no {MANIFEST_NAME}: it is no complete fine-tuned model",
            "let its training finish (the same command resumes it), or name another model",
        ) from error
    except (OSError, ValidationError) as error:
        raise ModelLoadError(
            f"{path} cannot be read: {first_line(error)}", "train or copy the model again"
        ) from error


def why_incomplete(directory: Path) -> str | None:
    """Why the model in a directory cannot be used, or None. Looks at the files only, loads nothing."""
    if not (directory / MANIFEST_NAME).is_file():
        begun = any(directory.glob("checkpoints/checkpoint-*")) or any(directory.glob("checkpoint-*"))
        return f"no {MANIFEST_NAME}" + (": training is still going on or was interrupted" if begun else "")
    if not (directory / "config.json").is_file() and not (directory / "adapter_config.json").is_file():
        return "neither config.json nor adapter_config.json"
    try:
        read_manifest(directory)
        weight_paths(directory)
        base = missing_base(directory)
    except (ModelLoadError, ModelNotFoundError) as error:
        return error.what
    return None if base is None else f"it is an adapter and its base {base} is missing"


def list_models(models_dir: Path) -> list[ModelEntry]:
    """All runs under `models_dir`, the one that ended last first; [] when there is no such directory."""
    if not models_dir.is_dir():
        return []
    directories = [
        path
        for path in models_dir.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != PROMOTED
    ]
    return sorted(
        map(_entry, directories), key=lambda entry: (entry.ordered_at, entry.run_name), reverse=True
    )


def _entry(directory: Path) -> ModelEntry:
    reason = why_incomplete(directory)
    changed_at = ordered_at = datetime.fromtimestamp(directory.stat().st_mtime, UTC)
    try:
        manifest = read_manifest(directory)
        changed_at, ordered_at = moment_of_text(manifest.finished_at), moment_of(manifest)
    except (ModelLoadError, ModelNotFoundError):
        manifest = None
    except ValueError:  # a hand-made date; the directory's own serves
        pass
    return ModelEntry(directory.name, directory, manifest, reason, changed_at, ordered_at)


def moment_of(manifest: ModelManifest) -> datetime:
    """Where a model stands among others; ValueError for a hand-made date that is none."""
    return moment_of_text(manifest.ordered_at or manifest.finished_at)


def moment_after_all(models_dir: Path, finished_at: str) -> str:
    """`finished_at`, or the moment after the last of all models that are there, where the clock has gone back."""
    moments = [entry.ordered_at for entry in list_models(models_dir) if entry.manifest is not None]
    after = max(moments, default=datetime.min.replace(tzinfo=UTC)) + timedelta(microseconds=1)
    return max(moment_of_text(finished_at), after).isoformat()


def moment_of_text(text: str) -> datetime:
    """A moment as it is written; ValueError for what is none."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
