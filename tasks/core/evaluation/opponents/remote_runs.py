"""Runs at a URL: what an evaluation needs is brought here first, and its results are sent back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tasks.core.models.trained import registry
from tasks.core.storage.store import Store, is_url

# What a machine keeps for itself, or what generation sends.
_NOT_RESULTS = {
    "identity.json",
    "ledger.jsonl",
    "ledger.id",
    "sessions.jsonl",
    "prompts.bin",
    "manifest.json",
}


def bring_manifests(runs: Store) -> None:
    """Bring the manifests of all runs, so that they can be looked up. Raises StorageError."""
    runs.pull_each("manifest.json")


def bring_overview(runs: Store) -> dict[str, bool] | None:
    """Bring what a list of all runs tells: manifests, scores, and which run is not finished.

    Returns the names of the runs at the URL, each with whether it has answers in a ledger; None for a folder.
    """
    files = runs.pull_each("identity.json", "manifest.json", "evaluator_output_summary.json")
    if not runs.is_remote:
        return None
    found: dict[str, bool] = {}
    for name, slash, file in (path.partition("/") for path in files):
        if slash and not name.startswith("."):
            found[name] = found.get(name, False) or file.startswith("ledgers/")
    return found


def bring_run(runs: Store, path: Path | None) -> None:
    """Bring a run's published files; ledgers stay where they are. Raises StorageError."""
    if path is not None and runs.is_remote and path.is_relative_to(runs.local):
        name = path.relative_to(runs.local).parts[0]
        runs.pull(name, leave_out=f"{name}/ledgers/")


def store_of(run: str | Path | None, runs_dir: str) -> Store:
    """Return where a named run is kept: beside a run given by its URL, else where the settings say."""
    return (
        Store(str(run).rstrip("/").rpartition("/")[0]) if run is not None and is_url(run) else Store(runs_dir)
    )


def name_within(run: str | Path) -> str | Path:
    """Return a run's name where it is given by its URL; anything else as it is."""
    return str(run).rstrip("/").rpartition("/")[2] if is_url(run) else run


def bring_training(model_id: str) -> Path:
    """Return where the manifest of a model can be read, brought here when the model is at a URL."""
    if not is_url(model_id):
        return Path(model_id)
    models, name = store_of(model_id, ""), str(name_within(model_id))
    models.pull(name, only=[registry.MANIFEST_NAME])
    return models.local / name


def withdraw(runs: Store, paths: Iterable[Path]) -> None:
    """Remove files there that are gone here, such as the report of an earlier evaluation. Raises StorageError."""
    for path in paths:
        if runs.is_remote and path.is_relative_to(runs.local) and not path.exists():
            runs.remove(path.relative_to(runs.local).as_posix())


def send_results(runs: Store, directory: Path) -> None:
    """Send the files of an evaluation to where the run is. Raises StorageError."""
    if runs.is_remote and directory.is_relative_to(runs.local):
        files = sorted(path for path in directory.iterdir() if path.is_file())
        runs.push(path for path in files if path.name not in _NOT_RESULTS and not path.name.startswith("."))
