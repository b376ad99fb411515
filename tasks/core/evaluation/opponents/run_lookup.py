"""Which runs are compared, and which models must still answer to be compared.

The candidate is found by name or as the newest, its opponents by weights and rows: the base model and the champion. A
pipeline asks what they are and how their runs are called, and hands on what it has run; whoever evaluates alone
searches.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError, ModelLoadError, ModelNotFoundError, TuneproofError
from tasks.core.evaluation.opponents.remote_runs import (
    bring_manifests,
    bring_run,
    bring_training,
    name_within,
    store_of,
)
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary_content
from tasks.core.evaluation.summary import Opponent
from tasks.core.files import exists, is_folder
from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained.champion import current_champion, refuse_changed, why_changed
from tasks.core.models.trained.folders import address_of, folder_of, is_model
from tasks.core.models.trained.registry import read_manifest, slug, why_incomplete
from tasks.core.records import ModelManifest, RunIdentity, RunManifest
from tasks.core.runs.run_dir import RunDir
from tasks.core.storage.store import Store, as_store

if TYPE_CHECKING:
    from tasks.core.config import InferencerConfig

KEY_LENGTH = 8
"""Characters of a run key in the name of a run that was made to compare."""
NAMELESS_OPPONENTS = ("base", "champion", "none")
"""Baselines that are no name of a run."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run directory whose predictions are whole."""

    path: Path
    manifest: RunManifest


@dataclass(frozen=True, slots=True)
class OpponentModel:
    """A model to compare with, the number format to load it in, and its run over the same rows or that run's name."""

    model_id: str
    revision: str | None
    dtype: str
    run_name: str
    finished: RunManifest | None = None


@dataclass(frozen=True, slots=True)
class OpponentRun:
    """The run to compare with; without `path`, `reason` says in words why there is none."""

    path: Path | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ComparedRuns:
    """What is evaluated: run directories (or files of predictions), and the candidate's training if known.

    `champion_path` is set when a champion is compared besides the baseline; `missing_champion` says why the
    promoted model, though there is one, is not compared.
    """

    candidate_path: Path
    baseline_path: Path | None
    trained: ModelManifest | None
    no_baseline_reason: str | None = None
    baseline_kind: Opponent = "base"
    champion_path: Path | None = None
    missing_champion: str | None = None


def finished_runs(runs_dir: Path) -> list[FinishedRun]:
    """Runs with a readable manifest under `runs_dir`, newest first."""
    runs = []
    for path in runs_dir.iterdir() if runs_dir.is_dir() else ():
        try:
            runs.append(FinishedRun(path, RunDir(path).read_manifest()))
        except (TuneproofError, OSError):
            continue
    return sorted(runs, key=lambda run: (run.manifest.finish_order, run.path.name), reverse=True)


def search_runs(
    runs_dir: Path, is_right: Callable[[RunManifest], bool], known: Sequence[FinishedRun] = ()
) -> list[FinishedRun]:
    """Those of the `known` runs that are right; where none is, those of all finished runs, newest first."""
    return [run for run in known if is_right(run.manifest)] or [
        run for run in finished_runs(runs_dir) if is_right(run.manifest)
    ]


def made_to_compare(run: RunManifest) -> bool:
    """Tell whether a base model or champion answered as somebody's opponent: its name holds the start of its key."""
    return f"-{run.run_key[:KEY_LENGTH]}" in run.run_name


def locate_run(run: str | Path, runs_dir: Path) -> Path:
    """Path of a run given as its directory, a file of predictions, or its name under `runs_dir`.

    Raises EvaluationError with the nearest names when there is none.
    """
    named = runs_dir / run
    inside = is_folder(named) and named.resolve().is_relative_to(runs_dir.resolve())
    if inside:
        return named
    path = Path(run)
    if exists(path):
        return path
    names = [found.path.name for found in finished_runs(runs_dir)]
    near = difflib.get_close_matches(str(run), names, n=3)
    known = f"name one of: {', '.join(names[:10])}" if names else "run `tuneproof infer` first"
    known = f"did you mean {' or '.join(near)}?" if near else known
    raise EvaluationError(f"there is no run {str(run)!r}, neither in {runs_dir} nor as a path", known)


def newest_run(runs_dir: Path, dataset_id: str | None) -> Path:
    """The run that finished last, over the given data set if one is named.

    Opponents answer after their candidate; they are passed over: runs that were made to compare, and those of the
    base of another run over the same rows. Raises EvaluationError when there is no finished run.
    """
    runs = finished_runs(runs_dir)
    chosen = [run for run in runs if dataset_id is None or run.manifest.dataset_id == dataset_id]
    if not chosen:
        of_dataset = f" over {dataset_id}" if dataset_id and runs else ""
        raise EvaluationError(
            f"there is no finished run{of_dataset} in {runs_dir}",
            "run `tuneproof infer` first, or name a run directory or a file of predictions",
        )
    bases = {
        (run.manifest.identity.model.weights_sha256, run.manifest.identity.rows_sha256)
        for run in chosen
        if run.manifest.identity.model.adapter_sha256 is not None
    }

    def is_opponent(run: FinishedRun) -> bool:
        model, rows = run.manifest.identity.model, run.manifest.identity.rows_sha256
        is_base = model.adapter_sha256 is None and (model.weights_sha256, rows) in bases
        return is_base or made_to_compare(run.manifest)

    return next((run for run in chosen if not is_opponent(run)), chosen[0]).path


def training_manifest(candidate_path: Path) -> ModelManifest | None:
    """Manifest of the model that answered, when it is one that was fine-tuned here and is still there."""
    if not candidate_path.is_dir():
        return None
    try:
        model_id = RunDir(candidate_path).read_manifest().identity.model.model_id
        return read_manifest(bring_training(model_id))
    except (TuneproofError, OSError):
        return None


def find_base_run(
    candidate_path: Path,
    trained: ModelManifest | None,
    runs_dir: Path,
    known: Sequence[FinishedRun] = (),
) -> OpponentRun:
    """The newest run of the candidate's base model over the same rows; same settings are preferred."""
    if not candidate_path.is_dir():
        return OpponentRun(None, "a file of predictions says nothing about its base model")
    candidate = RunDir(candidate_path).read_manifest()
    model = candidate.identity.model
    if trained is None and model.adapter_sha256 is None:
        return OpponentRun(
            None, f"{model.model_id} is no fine-tuned model of this project, so it has no base"
        )
    base_weights = model.weights_sha256 if model.adapter_sha256 else trained and trained.base_weights_sha256

    def is_of_base(run: RunManifest) -> bool:
        is_base = (
            run.identity.model.weights_sha256 == base_weights and run.identity.model.adapter_sha256 is None
        )
        return is_base and run.identity.rows_sha256 == candidate.identity.rows_sha256

    runs = search_runs(runs_dir, is_of_base, known)
    if not runs:
        base = trained.base_model_id if trained else model.base_model_id
        return OpponentRun(None, f"{runs_dir} has no run of the base model {base} over the same rows")
    return OpponentRun(min(runs, key=lambda run: _setting_differences(candidate, run.manifest)).path)


def _setting_differences(candidate: RunManifest, base: RunManifest) -> int:
    return len(candidate.identity.differences(base.identity))


def find_opponents(
    baseline: str,
    candidate_path: Path,
    models_dir: Store | Path,
    runs_dir: Path,
    known: Sequence[FinishedRun] = (),
) -> ComparedRuns:
    """The candidate with its opponents for the config's `baseline`: "base", "champion", "none", a run name or a path.

    The champion, if there is one, is compared in any case, except with "none". Without a champion, "champion"
    means the base model. `known` are runs that were made for this comparison: where they are of the right model and
    rows, no others are searched.
    """
    trained = training_manifest(candidate_path)
    if baseline == "none":
        return ComparedRuns(candidate_path, None, trained)
    champion = find_champion_run(candidate_path, models_dir, runs_dir, known)
    if baseline == "champion" and champion is not None and champion.path is not None:
        return ComparedRuns(candidate_path, champion.path, trained, None, "champion")
    kind: Opponent = "base" if baseline in ("base", "champion") else "run"
    against = (
        find_base_run(candidate_path, trained, runs_dir, known)
        if kind == "base"
        else OpponentRun(locate_run(baseline, runs_dir))
    )
    compared = ComparedRuns(candidate_path, against.path, trained, against.reason, kind)
    if champion is None:
        return compared
    return replace(compared, champion_path=champion.path, missing_champion=champion.reason)


def find_champion_run(
    candidate_path: Path, models_dir: Store | Path, runs_dir: Path, known: Sequence[FinishedRun] = ()
) -> OpponentRun | None:
    """The promoted model's run over the candidate's rows; None when no model is promoted.

    Raises ModelLoadError when nobody can say which model is promoted.
    """
    promoted = current_champion(models_dir)
    if promoted is None:
        return None
    name = promoted.run_name
    if not candidate_path.is_dir():
        return OpponentRun(None, f"A file of answers cannot be compared with the champion {name}")
    directory = folder_of(models_dir, name)
    if not directory.is_dir():
        place = as_store(models_dir).place
        return OpponentRun(
            None, f"The champion {name} is gone from {place}, so nothing can be better than it"
        )
    changed = why_changed(models_dir, promoted)
    if changed is not None:
        return OpponentRun(None, f"{changed[0].upper()}{changed[1:]}, so nothing can be better than it")
    candidate, digest = RunDir(candidate_path).read_manifest(), weights_sha256(directory)

    def is_of_champion(run: RunManifest) -> bool:
        weights = run.identity.model.adapter_sha256 or run.identity.model.weights_sha256
        return weights == digest and run.identity.rows_sha256 == candidate.identity.rows_sha256

    runs = search_runs(runs_dir, is_of_champion, known)
    if not runs:
        how = "`tuneproof infer --inferencer.model promoted` on the same rows gives one"
        return OpponentRun(None, f"The champion {name} has no run over these rows; {how}")

    def distance(run: FinishedRun) -> tuple[int, bool]:
        """A model that was trained again can have the champion's weights; its own run comes first."""
        is_own = is_model(run.manifest.identity.model.model_id, models_dir, name)
        return _setting_differences(candidate, run.manifest), not is_own

    return OpponentRun(min(runs, key=distance).path)


def find_and_bring(run: str | Path, runs_dir: str) -> Path:
    """Return where a run is that is given by name, path or URL; its published files are brought here."""
    runs = store_of(run, runs_dir)
    bring_manifests(runs)
    path = locate_run(name_within(run), runs.local)
    bring_run(runs, path)
    if runs.is_remote:
        _bring_compared(runs, path)
    return path


def _bring_compared(runs: Store, path: Path) -> None:
    """Bring the runs that a run's evaluation compared it with: a report shows their answers too."""
    try:
        content = read_summary_content(EvaluationFiles(path).summary_path)
    except (TuneproofError, OSError):
        return  # it was not evaluated
    for other in filter(None, (content.get("baseline"), content.get("champion"))):
        answers = Path(os.path.normpath(path / other["predictions_path"]))
        if answers.is_relative_to(runs.local):
            bring_run(runs, answers.parent)


def find_baseline(candidate: RunManifest, settings: InferencerConfig) -> OpponentModel | None:
    """Find the base of the model that answered; None when that model is no fine-tuned one.

    The run's name holds the start of its run key, so that it changes with the rows
    and settings, and stays the same for the next model that is compared on the same rows. It answers in the
    candidate's number format: a full fine-tuning may hold other numbers than its base, and both must have the same.
    """
    model_id, revision = _base_of(candidate)
    if model_id is None:
        return None
    opponent, _ = _opponent(candidate, settings, model_id, revision, slug(model_id))
    return opponent


def find_champion(
    candidate: RunManifest, settings: InferencerConfig, *, models_dir: Store | Path, runs_dir: Path
) -> OpponentModel | None:
    """Find the promoted model, and its answers to the candidate's rows with the same settings if they are there.

    None when nothing is promoted. Raises ModelNotFoundError when the promoted model's files are gone, ModelLoadError
    when they have changed, or when the history of promotions does not agree.
    """
    promoted = current_champion(models_dir)
    if promoted is None:
        return None
    name, directory = promoted.run_name, folder_of(models_dir, promoted.run_name)
    reason = why_incomplete(directory) if directory.is_dir() else "its directory is gone"
    if reason is not None:
        raise ModelNotFoundError(
            f"the promoted model {address_of(models_dir, name)} cannot be compared: {reason}",
            "put it back, promote another one (`tuneproof promote RUN --force --reason TEXT`), or set "
            "pipeline.compare_with_champion = false",
        )
    refuse_changed(models_dir, promoted)
    opponent, identity = _opponent(candidate, settings, str(directory), None, slug(name))
    found = [
        manifest
        for run in search_runs(runs_dir, lambda manifest: manifest.run_key == identity.run_key)
        if (manifest := RunDir(run.path).finished_manifest()) is not None
    ]
    # A model that was trained again can have the same weights: the champion's own run comes first.
    found.sort(key=lambda manifest: not is_model(manifest.identity.model.model_id, models_dir, name))
    return replace(opponent, run_name=found[0].run_name, finished=found[0]) if found else opponent


def _base_of(candidate: RunManifest) -> tuple[str | None, str | None]:
    model = candidate.identity.model
    try:
        trained = read_manifest(Path(model.model_id))
    except (ModelNotFoundError, ModelLoadError):
        return model.base_model_id, None
    return trained.base_model_id, trained.base_model_revision


def _opponent(
    candidate: RunManifest, settings: InferencerConfig, model_id: str, revision: str | None, name: str
) -> tuple[OpponentModel, RunIdentity]:
    """A model that answers the candidate's rows in its number format, and the identity of its run."""
    from tasks.core.models.loading import ModelSpec, identify

    dtype = candidate.identity.model.dtype
    model = identify(replace(ModelSpec.of_answering(settings, model_id, revision), dtype=dtype))
    identity = candidate.identity.model_copy(update={"model": model})
    run_name = f"{name}-{slug(candidate.dataset_id)}-{identity.run_key[:KEY_LENGTH]}"
    return OpponentModel(model_id, revision, dtype, run_name), identity
