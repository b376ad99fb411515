"""Which model an evaluation is about, and what it says for a promotion."""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import ModelNotFoundError, PromotionError, TuneproofError
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary
from tasks.core.evaluation.summary import EvaluationSummary, RunSummary
from tasks.core.models.trained.model_store import list_models
from tasks.core.promotion.promotion import Evidence, PromotedScore
from tasks.core.storage.store import Store, as_store, is_url


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model under `models/` and the evaluation of its answers, if there is one."""

    model_run_name: str
    evidence: Evidence | None


def this_user() -> str:
    """Who runs this process, as user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def evidence_of(summary: EvaluationSummary, summary_path: Path, models_dir: Store | Path) -> Evidence:
    """What a promotion keeps of an evaluation."""
    candidate, verdict = summary.candidate, summary.verdict
    champion = summary.champion
    if champion is None and verdict is not None and verdict.against == "champion":
        champion = summary.baseline
    opponent = champion or summary.baseline
    return Evidence(
        run_name=candidate.run_name,
        run_key=candidate.run_key,
        weights_sha256=_own_digest(candidate),
        opponent_run_name=None if opponent is None else opponent.run_name,
        opponent_run_key=None if opponent is None else opponent.run_key,
        champion=None if champion is None else model_run_name(champion, models_dir),
        dataset_id=candidate.dataset_id,
        dataset_split=candidate.dataset_split,
        rows=candidate.rows,
        scores=tuple(
            PromotedScore(
                metric=metric.name,
                value=metric.value,
                interval=metric.interval,
                opponent_value=_value(opponent, metric.name),
            )
            for metric in candidate.metrics
        ),
        verdict=verdict,
        evaluated_at=summary.evaluated_at,
        summary_path=str(summary_path),
    )


def model_run_name(run: RunSummary, models_dir: Store | Path) -> str | None:
    """Name of the model under `models_dir` that gave a run's answers; None for any other model."""
    if run.identity is None:
        return None
    models, model_id = as_store(models_dir), run.identity.model.model_id
    if is_url(model_id):
        place, _, name = model_id.rstrip("/").rpartition("/")
        return name if models.is_remote and place == models.place.rstrip("/") else None
    path = Path(model_id).expanduser()
    inside = path.resolve().parent == models.local.resolve()
    return path.name if inside else None


def find_evaluated(name: str | None, models_dir: Store | Path, runs_dir: Path) -> Evaluated:
    """The model to promote, by its own name, by the name of an evaluated run, or (None) the newest evaluated.

    Raises PromotionError when a run's model is not under `models_dir`, ModelNotFoundError when there is none.
    """
    models = as_store(models_dir)
    there = frozenset(models.names())
    found = _evaluations(models, there, runs_dir)
    if name is None:
        if not found:
            raise ModelNotFoundError(
                f"no evaluated model in {models.place} and {runs_dir}", "run `tuneproof evaluate` first"
            )
        return found[0]
    name = Path(name).name if Path(name).is_dir() else name.removeprefix(f"{models.place.rstrip('/')}/")
    if name in there:
        return next((one for one in found if one.model_run_name == name), Evaluated(name, None))
    for one in found:
        if one.evidence is not None and one.evidence.run_name == name:
            return one
    if (runs_dir / name).is_dir():
        raise PromotionError(
            f"the run {name} was not evaluated, or its model is not in {models.place}",
            "`tuneproof evaluate` it; only models in that folder can be promoted (`tuneproof models`)",
        )
    names = [entry.run_name for entry in list_models(models)]
    told = f"there are: {', '.join(names[:10])}" if names else "there are none"
    raise ModelNotFoundError(f"no model {name!r} in {models.place}; {told}", "name one of `tuneproof models`")


def _evaluations(models: Store, there: frozenset[str], runs_dir: Path) -> list[Evaluated]:
    """Evaluated runs of models that are there, the newest evaluation first."""
    found: list[tuple[str, Evaluated]] = []
    for path in runs_dir.iterdir() if runs_dir.is_dir() else ():
        summary_path = EvaluationFiles(path).summary_path
        try:
            summary = read_summary(summary_path)
        except (TuneproofError, OSError):
            continue
        name = model_run_name(summary.candidate, models)
        if name is not None and name in there:
            evidence = evidence_of(summary, summary_path, models)
            found.append((summary.evaluated_at, Evaluated(name, evidence)))
    return [one for _, one in sorted(found, key=lambda item: item[0], reverse=True)]


def _own_digest(run: RunSummary) -> str | None:
    """Digest of the model's own folder: the adapter's, or the full model's."""
    model = run.identity.model if run.identity else None
    return None if model is None else model.adapter_sha256 or model.weights_sha256


def _value(run: RunSummary | None, name: str) -> float | None:
    metric = None if run is None else run.metric(name)
    return None if metric is None else metric.value
