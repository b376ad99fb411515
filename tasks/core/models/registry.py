"""The fine-tuned models under `models/`: their names, manifests, and which of them are complete."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from tasks.core.errors import ConfigError, ModelLoadError, ModelNotFoundError, first_line
from tasks.core.files import write_atomically
from tasks.core.models.bases import missing_base
from tasks.core.models.checking import weight_paths
from tasks.core.models.digests import weights_sha256
from tasks.core.models.packaged import package_model_dir
from tasks.core.records import ModelManifest

__all__ = [
    "ModelEntry",
    "check_run_name",
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
PROMOTED = "promoted"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RUN_NAME_LIMIT = 100
# Two slugs, a time or key and a short prefix fit into one run name.
_SLUG_LIMIT = 36
_DIGEST_LENGTH = 5
# As long as the time in the name of a training, 20261127-143000.
_TAIL_LENGTH = 15


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One directory under `models/`. `reason` says why it is not complete; `manifest` is None without one."""

    run_name: str
    path: Path
    manifest: ModelManifest | None
    reason: str | None
    changed_at: datetime

    @property
    def complete(self) -> bool:
        """Whether the model can be loaded: manifest, configuration, weights and base are there."""
        return self.reason is None


def check_run_name(run_name: str) -> str:
    """Give the name back if it can be a folder's name and nothing else; ConfigError otherwise."""
    problem = None
    if len(run_name) > _RUN_NAME_LIMIT:
        problem = f"it has {len(run_name)} characters, at most {_RUN_NAME_LIMIT} are allowed"
    elif _RUN_NAME.fullmatch(run_name) is None or ".." in run_name:
        problem = "a name starts with a letter or digit; letters, digits, '.', '_' and '-' follow, never '..'"
    if problem is not None:
        raise ConfigError(
            f"run name {run_name[:120]!r} is not allowed: {problem}",
            f"take for example {_suggestion(run_name)!r}",
        )
    return run_name


_DATA_SUFFIXES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def slug(name: str) -> str:
    """Make a Hub id, path or package: name a part of a run name: its last part, without a file's suffix."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    stem = re.sub(r"\.(gguf|jsonl|json|csv|tsv|parquet)$", "", last, flags=re.IGNORECASE)
    cleaned = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", stem.lower()).strip("._-")
    return shortened(cleaned, _SLUG_LIMIT) or "unnamed"


def shortened(name: str, limit: int) -> str:
    """Give a name of at most `limit` (30 or more) characters that stays as unique as `name` is.

    The middle goes: a name ends with what tells it from others, such as its time, and a digest stands for the rest.
    """
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    tail = name[-_TAIL_LENGTH:].strip("._-")
    head = name[: limit - len(digest) - len(tail) - 2].strip("._-")
    return f"{head}-{digest}-{tail}"


def made_up_name(name: str, prefix: str, suffix: str) -> str:
    """Put prefix and suffix around a name that nobody gave, which is shortened to fit; ConfigError if it cannot."""
    room = max(_SLUG_LIMIT, _RUN_NAME_LIMIT - len(prefix) - len(suffix))
    return check_run_name(f"{prefix}{shortened(name, room)}{suffix}")


def data_slug(data_id: str | Sequence[str]) -> str:
    """The same for data: of a pattern the last part that says something, of several the first and how many more."""
    first, *others = [data_id] if isinstance(data_id, str) else data_id
    if any(mark in first for mark in "*?["):
        parts = [re.sub(r"\[[^\]]*\]|[*?]", "", part) for part in re.split(r"[/\\]", first)]
        names = [
            name for part in parts if (name := slug(part) if part.strip(".") else "unnamed") != "unnamed"
        ]
        name = next((name for name in reversed(names) if f".{name}" not in _DATA_SUFFIXES), "unnamed")
    else:
        name = slug(first)
    return f"{name}-and-{len(others)}-more" if others else name


def _suggestion(run_name: str) -> str:
    cleaned = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", run_name))
    return cleaned.strip("._-")[:_RUN_NAME_LIMIT] or "my-run"


def model_dir(models_dir: Path, run_name: str) -> Path:
    """Where the model of a run is written. Neither the name nor a symbolic link can lead out of `models_dir`.

    Raises ConfigError for a bad name, the reserved name `promoted`, or a link that points elsewhere.
    """
    check_run_name(run_name)
    if run_name == PROMOTED:
        raise ConfigError(
            f"run name {PROMOTED!r} is reserved for the model in use", "choose another run_name"
        )
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
    """All runs under `models_dir`, newest first (by the end of training); [] when there is no such directory."""
    if not models_dir.is_dir():
        return []
    directories = [
        path
        for path in models_dir.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != PROMOTED
    ]
    return sorted(
        map(_entry, directories), key=lambda entry: (entry.changed_at, entry.run_name), reverse=True
    )


def _entry(directory: Path) -> ModelEntry:
    reason = why_incomplete(directory)
    changed_at = datetime.fromtimestamp(directory.stat().st_mtime, UTC)
    try:
        manifest = read_manifest(directory)
        finished_at = datetime.fromisoformat(manifest.finished_at)
        changed_at = finished_at if finished_at.tzinfo else finished_at.replace(tzinfo=UTC)
    except (ModelLoadError, ModelNotFoundError):
        manifest = None
    except ValueError:  # a hand-made date; the directory's own serves
        pass
    return ModelEntry(directory.name, directory, manifest, reason, changed_at)


def promoted_run(models_dir: Path) -> str | None:
    """Name of the promoted run: `models/promoted.json` with {"run_name": …}, else the link `models/promoted`.

    None when nothing was promoted; ModelLoadError when the pointer is damaged.
    """
    pointer_path = models_dir / f"{PROMOTED}.json"
    link = models_dir / PROMOTED
    if pointer_path.is_file():
        try:
            return check_run_name(str(json.loads(pointer_path.read_text(encoding="utf-8"))["run_name"]))
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise ModelLoadError(
                f"{pointer_path} names no run: {error}",
                "promote a model again with --force, or delete the file",
            ) from error
    if link.is_symlink():
        return link.readlink().name
    return PROMOTED if link.is_dir() else None
