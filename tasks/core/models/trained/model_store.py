"""Models at a URL: the one that is wanted is brought here, and a trained one is sent there, manifest last."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from tasks.core.models.trained import registry
from tasks.core.models.trained.alias import LINE_FILES
from tasks.core.models.trained.registry import MANIFEST_NAME, PROMOTED, ModelEntry, promoted_run
from tasks.core.records import ModelManifest
from tasks.core.storage.store import Store

_CHECKPOINTS = "checkpoints"


def list_manifests(models: Store) -> list[ModelManifest]:
    """Manifests of the complete models at a URL, newest first; a damaged one is left out."""
    found = []
    for name in models.names():
        content = models.read(f"{name}/{MANIFEST_NAME}")
        if content is None:
            continue
        try:
            manifest = ModelManifest.model_validate_json(content)
            found.append((registry.moment_of(manifest), manifest.run_name, manifest))
        except ValueError:  # also one whose date is none
            continue
    return [manifest for _, _, manifest in sorted(found, key=lambda one: one[:2], reverse=True)]


def list_models(models: Store) -> list[ModelEntry]:
    """All models, newest first; those at a URL are told by their manifests, and what has none is left out."""
    if not models.is_remote:
        return registry.list_models(models.local)
    return [
        ModelEntry(
            manifest.run_name,
            models.local / manifest.run_name,
            manifest,
            None,
            datetime.fromisoformat(manifest.finished_at),
            registry.moment_of(manifest),
        )
        for manifest in list_manifests(models)
    ]


def bring_promoted(models: Store) -> str | None:
    """Bring the model in use and what says which it is; return its name. Raises StorageError."""
    if models.is_remote:
        models.pull(only=LINE_FILES)
        there = set(models.files_below(""))
        for gone in set(LINE_FILES) - there:
            (models.local / gone).unlink(missing_ok=True)
    name = promoted_run(models.local)
    if name is not None:
        bring_model(models, name)
    return name


def bring_model(models: Store, name: str) -> None:
    """Bring one model's files, its checkpoints left out. Raises StorageError."""
    models.pull(name, leave_out=f"{name}/{_CHECKPOINTS}/")


def bring_wanted(models: Store, wanted: str | None, run_names: Sequence[str] = ()) -> None:
    """Bring the model that discovery will choose: by its name, the one in use, a run's, else the newest."""
    if not models.is_remote:
        return
    if wanted == PROMOTED:
        bring_promoted(models)
        return
    names = set(models.names())
    named = next((name for name in ((wanted,) if wanted is not None else run_names) if name in names), None)
    if named is not None:
        bring_model(models, named)
    if named is not None or wanted is not None:
        return
    for manifest in list_manifests(models)[:1]:
        bring_model(models, manifest.run_name)


def send_model(models: Store, directory: Path) -> None:
    """Send a trained model, its manifest last; checkpoints stay here. Raises StorageError."""
    if not models.is_remote:
        return
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    sent = [
        path
        for path in files
        if path.relative_to(directory).parts[0] != _CHECKPOINTS and not path.name.startswith(".")
    ]
    models.push(sorted(sent, key=lambda path: path.name == MANIFEST_NAME))
