"""Which model a run should use: the named one, else the newest fine-tuned one, and why not the others."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tasks.core.errors import ModelLoadError, ModelNotFoundError
from tasks.core.files import exists, is_folder
from tasks.core.models.checking import weight_paths
from tasks.core.models.locating import missing_base
from tasks.core.models.packaged import PREFIX, find_packaged_file
from tasks.core.models.trained import hub_search, registry
from tasks.core.models.trained.champion import current_champion, refuse_changed
from tasks.core.models.trained.folders import folder_of
from tasks.core.models.trained.model_store import list_models
from tasks.core.storage.store import Store, as_store

logger = logging.getLogger(__name__)

CandidateSource = Literal["explicit", "promoted", "local run", "hub run", "newest local", "newest on the Hub"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """The chosen model: what `ModelSpec` takes, where it was found and why it was taken."""

    model_id: str
    revision: str | None
    source: CandidateSource
    reason: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """A model or place that was looked at and not taken."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """The chosen model and everything that was looked at before it."""

    chosen: Candidate
    rejected: tuple[Rejection, ...]


@dataclass(slots=True)
class _Search:
    models: Store
    rejected: list[Rejection] = field(default_factory=list)

    def reject(self, model_id: str, reason: str) -> None:
        self.rejected.append(Rejection(model_id, reason))


def discover_model(
    *, model: str | None, run_names: Sequence[str] = (), hf_user_id: str | None, models_dir: Store | Path
) -> Discovery:
    """Choose a model: `model` if given; else the first of `run_names` that is there, locally or as
    `{hf_user_id}/{run_name}` on the Hub; else the newest complete one under `models_dir`; else the newest on the
    Hub for that user.

    A named `model` that cannot be used is an error, never a reason to take another one; for a run's name, which
    may be that of the answers alone, another one is taken with a warning. Raises ModelNotFoundError, which lists
    what was searched and the nearest names; ModelLoadError for a promoted model that nobody can be sure of.
    """
    found = find_model(model=model, run_names=run_names, hf_user_id=hf_user_id, models_dir=models_dir)
    chosen = found.chosen
    if model is None and run_names and chosen.source in ("newest local", "newest on the Hub"):
        logger.warning(
            "no model is called %s; %s answers instead (inferencer.model chooses one)",
            *(" or ".join(run_names), chosen.model_id),
        )
    logger.info("model %s: %s", chosen.model_id, chosen.reason)
    return found


def find_model(
    *, model: str | None, run_names: Sequence[str] = (), hf_user_id: str | None, models_dir: Store | Path
) -> Discovery:
    """Do what `discover_model` does, in silence."""
    search = _Search(as_store(models_dir))
    if model is not None:
        chosen = _explicit(search, model)
    else:
        chosen = (
            _first_named_run(search, run_names, hf_user_id)
            or _newest_local(search)
            or _newest_on_hub(search, hf_user_id)
        )
    if chosen is None:
        raise _not_found(search, model if model is not None else next(iter(run_names), None))
    return Discovery(chosen, tuple(search.rejected))


def _explicit(search: _Search, model: str) -> Candidate | None:
    if model == registry.PROMOTED:
        return _promoted(search)
    if model.startswith(PREFIX):
        find_packaged_file(model)  # its error tells what to install
        return Candidate(model, None, "explicit", "named in the settings, comes in a package")
    path = Path(model).expanduser()
    if exists(path):
        reason = _why_unusable(path)
        if reason is None:
            return Candidate(model, None, "explicit", "named in the settings, a path")
        search.reject(model, reason)
        return None
    local = _local_run(search, model, "named in the settings, a run under models_dir")
    if local is not None:
        return local
    return _hub_model(search, model, "explicit", "named in the settings, on the Hub")


def _promoted(search: _Search) -> Candidate | None:
    champion = current_champion(search.models)
    if champion is None:
        search.reject(search.models.address_of(registry.PROMOTED), "no model has been promoted yet")
        return None
    directory = folder_of(search.models, champion.run_name)
    reason = registry.why_incomplete(directory) if directory.is_dir() else "its directory is gone"
    if reason is not None:
        search.reject(search.models.address_of(champion.run_name), f"promoted, but {reason}")
        return None
    refuse_changed(search.models, champion)
    return Candidate(str(directory), None, "promoted", f"the promoted model is the run {champion.run_name}")


def _why_unusable(path: Path) -> str | None:
    """A path given by a person needs no manifest of ours, but something that can be loaded."""
    if path.is_file():
        return None if path.suffix == ".gguf" else "a file, but not a .gguf file"
    if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")):
        return None
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        problem: str | None = "no config.json or adapter_config.json"
    else:
        problem = _why_not_loadable(path)
    if problem is not None and (any(path.glob("checkpoints/checkpoint-*")) or any(path.glob("checkpoint-*"))):
        return f"training is still going on or was interrupted ({problem})"
    return problem


def _why_not_loadable(path: Path) -> str | None:
    try:
        weight_paths(path)
        base = missing_base(path)
    except ModelLoadError as error:
        return error.what
    return None if base is None else f"an adapter whose base {base} is missing"


def _first_named_run(search: _Search, run_names: Sequence[str], hf_user_id: str | None) -> Candidate | None:
    found = (_named_run(search, run_name, hf_user_id) for run_name in run_names)
    return next((candidate for candidate in found if candidate is not None), None)


def _named_run(search: _Search, run_name: str, hf_user_id: str | None) -> Candidate | None:
    local = _local_run(search, run_name, f"the run {run_name} is under models_dir")
    if local is not None or hf_user_id is None:
        return local
    return _hub_model(search, f"{hf_user_id}/{run_name}", "hub run", "the run's model on the Hub")


def _local_run(search: _Search, run_name: str, reason: str) -> Candidate | None:
    models = search.models
    directory = models.local / run_name
    if "/" in run_name or "\\" in run_name or not _is_there(models, run_name):
        search.reject(
            str(directory) if not models.is_remote else models.address_of(run_name), "no such directory"
        )
        return None
    incomplete = registry.why_incomplete(folder_of(models, run_name))
    if incomplete is not None:
        search.reject(models.address_of(run_name), incomplete)
        return None
    return Candidate(str(directory), None, "local run", reason)


def _is_there(models: Store, run_name: str) -> bool:
    return models.has(run_name) if models.is_remote else is_folder(models.local / run_name)


def _newest_local(search: _Search) -> Candidate | None:
    entries = list_models(search.models)
    if not entries:
        search.reject(search.models.place, "holds no fine-tuned model")
    chosen = next((entry for entry in entries if entry.complete and _is_whole_here(search, entry)), None)
    for entry in entries:
        if entry is not chosen and entry.complete:
            older = "complete, but older than the chosen one"
            search.reject(search.models.address_of(entry.run_name), older)
        elif entry is not chosen:
            search.reject(search.models.address_of(entry.run_name), str(entry.reason))
    if chosen is None:
        return None
    when = f"{chosen.changed_at:%Y-%m-%d %H:%M}"
    return Candidate(
        str(chosen.path), None, "newest local", f"newest complete fine-tuned model, finished {when}"
    )


def _is_whole_here(search: _Search, entry: registry.ModelEntry) -> bool:
    """Bring a model from a URL and look at its files, as one in a folder was looked at before."""
    return (
        not search.models.is_remote
        or registry.why_incomplete(folder_of(search.models, entry.run_name)) is None
    )


def _hub_model(search: _Search, model_id: str, source: CandidateSource, reason: str) -> Candidate | None:
    try:
        found = hub_search.find(model_id)
    except hub_search.NotUsable as error:
        search.reject(f"{model_id} on the Hub", str(error))
        return None
    return Candidate(found.model_id, found.revision, source, f"{reason}{found.remark}")


def _newest_on_hub(search: _Search, hf_user_id: str | None) -> Candidate | None:
    if hf_user_id is None:
        search.reject("the Hub", "not searched: hf_user_id is not set")
        return None
    place = f"models of {hf_user_id} on the Hub"
    try:
        for found in hub_search.newest_of(hf_user_id):
            if found.problem is None:
                return Candidate(
                    found.model_id, found.revision, "newest on the Hub", f"newest of the {place}"
                )
            search.reject(f"{found.model_id} on the Hub", found.problem)
        search.reject(place, "no usable one that you may see")
    except hub_search.NotUsable as error:
        search.reject(place, str(error))
    return None


def _not_found(search: _Search, wanted: str | None) -> ModelNotFoundError:
    searched = "\n".join(f"  - {rejection.model_id}: {rejection.reason}" for rejection in search.rejected)
    what = f"no usable model{'' if wanted is None else f' {wanted!r}'} was found; searched:\n{searched}"
    names = [entry.run_name for entry in list_models(search.models)]
    near = difflib.get_close_matches(Path(wanted).name, names, n=3, cutoff=0.5) if wanted else []
    if near:
        return ModelNotFoundError(what, f"did you mean {' or '.join(near)}?")
    if wanted is not None:
        there = f"; runs in {search.models.place}: {', '.join(names[:5])}" if names else ""
        return ModelNotFoundError(what, f"name a directory, a run, a Hub id or a package: model{there}")
    return ModelNotFoundError(
        what, "train one (`tuneproof finetune`), or set inferencer.model to a path or a Hub id"
    )
