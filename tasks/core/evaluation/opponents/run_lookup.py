"""Which runs are compared: the candidate by name or as the newest, the baseline as the base model's run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import EvaluationError, TuneproofError
from tasks.core.evaluation.opponents.remote_runs import (
    bring_manifests,
    bring_run,
    bring_training,
    name_within,
    store_of,
)
from tasks.core.evaluation.summary import Opponent
from tasks.core.files import exists, is_folder
from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained.champion import current_champion, why_changed
from tasks.core.models.trained.registry import read_manifest
from tasks.core.records import ModelManifest, RunManifest
from tasks.core.runs.run_dir import RunDir

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
class BaseRun:
    """The run to compare with; without `path`, `reason` says in words why there is none."""

    path: Path | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Opponents:
    """The runs that a candidate is compared with.

    `champion` is set when a champion is compared besides the baseline; `missing_champion` says why the
    promoted model, though there is one, is not compared.
    """

    baseline: BaseRun
    kind: Opponent = "base"
    champion: Path | None = None
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
) -> BaseRun:
    """The newest run of the candidate's base model over the same rows; same settings are preferred."""
    if not candidate_path.is_dir():
        return BaseRun(None, "a file of predictions says nothing about its base model")
    candidate = RunDir(candidate_path).read_manifest()
    model = candidate.identity.model
    if trained is None and model.adapter_sha256 is None:
        return BaseRun(None, f"{model.model_id} is no fine-tuned model of this project, so it has no base")
    base_weights = model.weights_sha256 if model.adapter_sha256 else trained and trained.base_weights_sha256

    def is_of_base(run: RunManifest) -> bool:
        is_base = (
            run.identity.model.weights_sha256 == base_weights and run.identity.model.adapter_sha256 is None
        )
        return is_base and run.identity.rows_sha256 == candidate.identity.rows_sha256

    runs = search_runs(runs_dir, is_of_base, known)
    if not runs:
        base = trained.base_model_id if trained else model.base_model_id
        return BaseRun(None, f"{runs_dir} has no run of the base model {base} over the same rows")
    return BaseRun(min(runs, key=lambda run: _setting_differences(candidate, run.manifest)).path)


def _setting_differences(candidate: RunManifest, base: RunManifest) -> int:
    return len(candidate.identity.differences(base.identity))


def find_opponents(
    baseline: str,
    candidate_path: Path,
    trained: ModelManifest | None,
    models_dir: Path,
    runs_dir: Path,
    known: Sequence[FinishedRun] = (),
) -> Opponents:
    """The runs to compare with for the config's `baseline`: "base", "champion", "none", a run name or a path.

    The champion, if there is one, is compared in any case, except with "none". Without a champion, "champion"
    means the base model. `known` are runs that were made for this comparison: where they are of the right model and
    rows, no others are searched.
    """
    if baseline == "none":
        return Opponents(BaseRun(None))
    champion = find_champion_run(candidate_path, models_dir, runs_dir, known)
    if baseline == "champion" and champion is not None and champion.path is not None:
        return Opponents(champion, "champion")
    kind: Opponent = "base" if baseline in ("base", "champion") else "run"
    against = (
        find_base_run(candidate_path, trained, runs_dir, known)
        if kind == "base"
        else BaseRun(locate_run(baseline, runs_dir))
    )
    if champion is None:
        return Opponents(against, kind)
    return Opponents(against, kind, champion.path, champion.reason)


def find_champion_run(
    candidate_path: Path, models_dir: Path, runs_dir: Path, known: Sequence[FinishedRun] = ()
) -> BaseRun | None:
    """The promoted model's run over the candidate's rows; None when no model is promoted.

    Raises ModelLoadError when nobody can say which model is promoted.
    """
    promoted = current_champion(models_dir)
    if promoted is None:
        return None
    name = promoted.run_name
    if not candidate_path.is_dir():
        return BaseRun(None, f"A file of answers cannot be compared with the champion {name}")
    directory = models_dir / name
    if not directory.is_dir():
        return BaseRun(
            None, f"The champion {name} is gone from {models_dir}, so nothing can be better than it"
        )
    changed = why_changed(models_dir, promoted)
    if changed is not None:
        return BaseRun(None, f"{changed[0].upper()}{changed[1:]}, so nothing can be better than it")
    candidate, digest = RunDir(candidate_path).read_manifest(), weights_sha256(directory)

    def is_of_champion(run: RunManifest) -> bool:
        weights = run.identity.model.adapter_sha256 or run.identity.model.weights_sha256
        return weights == digest and run.identity.rows_sha256 == candidate.identity.rows_sha256

    runs = search_runs(runs_dir, is_of_champion, known)
    if not runs:
        how = "`tuneproof infer --inferencer.model promoted` on the same rows gives one"
        return BaseRun(None, f"The champion {name} has no run over these rows; {how}")

    def distance(run: FinishedRun) -> tuple[int, bool]:
        """A model that was trained again can have the champion's weights; its own run comes first."""
        is_own = Path(run.manifest.identity.model.model_id).resolve() == directory.resolve()
        return _setting_differences(candidate, run.manifest), not is_own

    return BaseRun(min(runs, key=distance).path)


def find_and_bring(run: str | Path, runs_dir: str) -> Path:
    """Return where a run is that is given by name, path or URL; its published files are brought here."""
    runs = store_of(run, runs_dir)
    bring_manifests(runs)
    path = locate_run(name_within(run), runs.local)
    bring_run(runs, path)
    return path
