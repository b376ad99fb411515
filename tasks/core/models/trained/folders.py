"""Where the files of a model are: in its folder, or brought from a URL into the mirror."""

from __future__ import annotations

from pathlib import Path

from tasks.core.storage.store import Store, as_store, is_url

CHECKPOINTS = "checkpoints"
_MACHINES_OWN = ("lease.json",)


def folder_of(models: Store | Path, name: str) -> Path:
    """The folder of a model; its files are brought from a URL first, its checkpoints left out. Raises StorageError.

    The folder need not be there. What was brought before and is gone at the URL is gone here too.
    """
    store = as_store(models)
    staying = (f"{name}/{CHECKPOINTS}/", *(f"{name}/{own}" for own in _MACHINES_OWN))
    store.pull(name, leave_out=staying, forgets=True)
    return store.local / name


def address_of(models: Store | Path, name: str) -> str:
    """The folder of a model as a person would write it: a path or a URL."""
    return as_store(models).address_of(name)


def is_model(model_id: str, models: Store | Path, name: str) -> bool:
    """Tell whether a run's model, known by its path or URL, is this one."""
    store = as_store(models)
    if is_url(model_id):
        return store.is_remote and model_id.rstrip("/") == store.address_of(name)
    return Path(model_id).resolve() == (store.local / name).resolve()


def own_files(directory: Path) -> list[Path]:
    """The files of a model that make it: no checkpoints, and nothing that a machine keeps for itself."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return [
        path
        for path in files
        if path.relative_to(directory).parts[0] not in (CHECKPOINTS, *_MACHINES_OWN)
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]


def missing_there(models: Store | Path, name: str) -> list[str]:
    """Files of a model that are here and not at the URL, as where sending it was cut off. Raises StorageError."""
    store = as_store(models)
    if not store.is_remote:
        return []
    there = store.there(name)
    here = (path.relative_to(store.local).as_posix() for path in own_files(store.local / name))
    return [file for file in here if file not in there]
