"""The line of champions on one test set: what each of them scores there, with its interval."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tasks.core.errors import TuneproofError
from tasks.core.evaluation.opponents.run_lookup import finished_runs
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary
from tasks.core.evaluation.summary import ChampionPoint, RunSummary
from tasks.core.records import ModelIdentity

_MOST_RUNS = 100
_MOST_CHAMPIONS = 20


def champion_line(
    champions: Iterable[ChampionPoint], runs_dir: Path, rows_sha256: str, metric: str
) -> tuple[ChampionPoint, ...]:
    """The newest champions, oldest first, each with its figure on these rows where an evaluation has it.

    Evaluations over the same rows are read, of the newest 100 runs; a damaged one is passed over.
    """
    figures: dict[str, RunSummary] = {}
    same = [run for run in finished_runs(runs_dir) if run.manifest.identity.rows_sha256 == rows_sha256]
    for run in same[:_MOST_RUNS]:
        try:
            summary = read_summary(EvaluationFiles(run.path).summary_path)
        except TuneproofError:
            continue
        for found in (summary.candidate, summary.champion, summary.baseline):
            if found is not None and found.identity is not None and found.identity.rows_sha256 == rows_sha256:
                figures.setdefault(_weights(found.identity.model), found)
    newest = list(champions)[-_MOST_CHAMPIONS:]
    return tuple(
        point.model_copy(update={"score": found.metric(metric)})
        if (found := figures.get(point.weights_sha256 or "")) is not None
        else point
        for point in newest
    )


def _weights(model: ModelIdentity) -> str:
    """The digest by which a promotion knows a model: its adapter's, else its weights'."""
    return model.adapter_sha256 or model.weights_sha256
