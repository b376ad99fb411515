"""Models in a folder or at a URL: which there are, and a trained one is sent there, manifest last."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from tasks.core.errors import ModelLoadError, StorageError
from tasks.core.models.locating import missing_base
from tasks.core.models.trained import registry
from tasks.core.models.trained.folders import CHECKPOINTS, missing_there, own_files
from tasks.core.models.trained.registry import MANIFEST_NAME, PROMOTED, ModelEntry
from tasks.core.records import ModelManifest
from tasks.core.storage.store import Store, as_store

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"


def list_models(models: Store | Path) -> list[ModelEntry]:
    """All models, newest first. Of those at a URL only manifests are brought; what is there is told by a listing."""
    store = as_store(models)
    if not store.is_remote:
        return registry.list_models(store.local)
    files: dict[str, set[str]] = {}
    for path in store.pull_each(MANIFEST_NAME, _ADAPTER_CONFIG):
        name, slash, file = path.partition("/")
        if slash and not name.startswith(".") and name != PROMOTED:
            files.setdefault(name, set()).add(file)
    entries = (_entry(store, name, there) for name, there in files.items())
    return sorted(entries, key=lambda entry: (entry.ordered_at, entry.run_name), reverse=True)


def _entry(store: Store, name: str, files: set[str]) -> ModelEntry:
    directory = store.local / name
    manifest, problem = None, None
    if MANIFEST_NAME in files:
        try:
            manifest = registry.read_manifest(directory)
        except ModelLoadError as error:
            problem = error.what
    reason = problem or _why_incomplete(store, name, files)
    try:
        if manifest is not None:
            changed_at = registry.moment_of_text(manifest.finished_at)
            return ModelEntry(name, directory, manifest, reason, changed_at, registry.moment_of(manifest))
    except ValueError:  # a hand-made date
        pass
    begun = datetime.fromtimestamp(0, UTC)
    return ModelEntry(name, directory, manifest, reason, begun, begun)


def _why_incomplete(store: Store, name: str, files: set[str]) -> str | None:
    """What `registry.why_incomplete` says of a folder, of the names of the files at a URL."""
    if MANIFEST_NAME not in files:
        begun = any(file.startswith((f"{CHECKPOINTS}/checkpoint-", "checkpoint-")) for file in files)
        return f"no {MANIFEST_NAME}" + (": training is still going on or was interrupted" if begun else "")
    is_adapter = _ADAPTER_CONFIG in files
    if not is_adapter and "config.json" not in files:
        return "neither config.json nor adapter_config.json"
    stem = "adapter_model" if is_adapter else "model"
    missing = _missing_weights(store, f"{name}/{stem}.safetensors", stem, files)
    if missing is not None:
        return f"{store.address_of(name)} {missing}"
    base = missing_base(store.local / name) if is_adapter else None
    return None if base is None else f"it is an adapter and its base {base} is missing"


def _missing_weights(store: Store, address: str, stem: str, files: set[str]) -> str | None:
    if f"{stem}.safetensors" in files:
        return None
    index = f"{stem}.safetensors.index.json"
    if index not in files:
        return f"has no weights ({stem}.safetensors or {index})"
    try:
        content: Mapping[str, dict[str, str]] = json.loads(store.read(f"{address}.index.json") or b"")
        missing = sorted({*content["weight_map"].values()} - files)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"has a damaged index of its weights: {error}"
    return f"lacks {len(missing)} weight files: {', '.join(missing[:5])}" if missing else None


def bring_manifests(models: Store | Path) -> None:
    """Bring the manifests of all models at a URL, after which a new one is to stand. Raises StorageError."""
    as_store(models).pull_each(MANIFEST_NAME)


def list_manifests(models: Store) -> list[ModelManifest]:
    """Manifests of the complete models, newest first; a damaged one is left out."""
    return [entry.manifest for entry in list_models(models) if entry.manifest is not None and entry.complete]


def send_model(models: Store, directory: Path) -> None:
    """Send a trained model that is not there yet, its manifest last; checkpoints are sent while it is trained.

    Raises StorageError, which says that the model is complete here.
    """
    if not models.is_remote:
        return
    try:
        if missing_there(models, directory.name):
            models.push(sorted(own_files(directory), key=lambda path: path.name == MANIFEST_NAME))
    except StorageError as error:
        raise StorageError(
            f"{error.what}. The model is complete in {directory}, and not or only in part at "
            f"{models.address_of(directory.name)}",
            f"when it can be reached: the same training with the run name {directory.name} sends it and trains nothing",
        ) from error
