"""All runs side by side: grouped by the rows they answered, since figures over other rows do not compare."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.core.errors import TuneproofError
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary_content
from tasks.core.evaluation.summary import Decision, MetricSummary, RunSummary
from tasks.core.garbage import uncollected
from tasks.core.models.trained.registry import promoted_run
from tasks.core.records import RunManifest
from tasks.core.runs.run_dir import RunDir
from tasks.core.storage.store import Store, as_store

logger = logging.getLogger(__name__)

# What tells models apart, not settings; shown in columns of their own.
_NOT_SETTINGS = frozenset({"weights", "adapter", "rows"})


@dataclass(frozen=True, slots=True)
class RankedRun:
    """One finished run. `scores` is None while nobody evaluated its answers, as candidate or as baseline."""

    path: Path
    manifest: RunManifest
    scores: RunSummary | None
    error_policy: str | None
    decision: Decision | None
    promoted: bool
    report_path: Path | None
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def model_name(self) -> str:
        """Last part of the model's path or id."""
        return Path(self.manifest.identity.model.model_id).name

    @property
    def tokens_per_second(self) -> float | None:
        """Answer tokens per second of generation; None where it is not known."""
        return self.manifest.tokens_per_second

    def value(self, metric: str) -> float | None:
        """The run's figure by a metric; None when it was not computed."""
        found = self.scores.metric(metric) if self.scores else None
        return found.value if found else None


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs over the same rows, best first by `metrics[0]` if it has a direction, else newest first.

    Metrics with a direction come first. Runs without the first figure come last, newest first.
    """

    rows_sha256: str
    rows: int
    dataset: str
    runs: tuple[RankedRun, ...]
    metrics: tuple[MetricSummary, ...]

    @property
    def policies_differ(self) -> bool:
        """Whether error rows count as wrong in some of the figures and are left out of others."""
        return len({run.error_policy for run in self.runs if run.error_policy}) > 1


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Groups, the one with the newest run first, and directories without published answers with the reason."""

    groups: tuple[RunGroup, ...]
    unfinished: tuple[tuple[str, str], ...]


def read_leaderboard(
    runs_dir: Path, models_dir: Store | Path, there: Mapping[str, bool] | None = None
) -> Leaderboard:
    """Read every run under `runs_dir`; a damaged file hides its own figures and nothing else.

    For runs at a URL `runs_dir` is the mirror, and `there` says which there are and whether they have answers.
    """
    with uncollected():  # what is read has no cycles; with a thousand runs the search takes half of the time
        return _read(runs_dir, models_dir, there)


def _read(runs_dir: Path, models_dir: Store | Path, there: Mapping[str, bool] | None) -> Leaderboard:
    found = runs_dir.iterdir() if runs_dir.is_dir() else ()
    directories = sorted(
        (path for path in found if path.is_dir()) if there is None else (runs_dir / name for name in there)
    )
    finished: list[tuple[Path, RunManifest]] = []
    unfinished: list[tuple[str, str]] = []
    for path in directories:
        run = RunDir(path)
        try:
            finished.append((path, run.read_manifest()))
        except (TuneproofError, OSError):
            begun = bool(run.ledger_paths()) if there is None else there[path.name]
            unfinished.append(
                (path.name, "unfinished; the same command resumes it" if begun else "no answers")
            )
    summaries = {path: summary for path, _ in finished if (summary := _evaluated(path)) is not None}
    scored = _scores_by_answers(summaries.values())
    champion, place = _champion(models_dir), as_store(models_dir).place
    runs = [
        _ranked(path, manifest, summaries.get(path), scored, (Path(place).name, champion))
        for path, manifest in finished
    ]
    return Leaderboard(tuple(_groups(runs)), tuple(unfinished))


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """What is needed of a summary: its runs as they lie there, the candidate last, and the verdict.

    Validating whole summaries of a thousand runs, of which many name the same opponents, takes seconds.
    """

    evaluated_at: str
    runs: tuple[dict[str, Any], ...]
    error_rows: str
    decision: Decision | None


def _evaluated(run_dir: Path) -> _Evaluated | None:
    try:
        content = read_summary_content(EvaluationFiles(run_dir).summary_path)
    except (TuneproofError, OSError):
        return None
    runs = (content.get("champion"), content.get("baseline"), content["candidate"])
    verdict = content.get("verdict")
    return _Evaluated(
        content["evaluated_at"],
        tuple(run for run in runs if run is not None),
        content["settings"]["error_rows"],
        verdict and verdict["decision"],
    )


def _scores_by_answers(summaries: Iterable[_Evaluated]) -> dict[str, tuple[dict[str, Any], str]]:
    """The newest figures of each file of answers, which may have been scored as baseline or champion only."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for summary in sorted(summaries, key=lambda summary: summary.evaluated_at):
        for run in summary.runs:
            found[run["predictions_sha256"]] = run, summary.error_rows
    return found


def _champion(models_dir: Store | Path) -> str | None:
    try:
        return promoted_run(models_dir)
    except TuneproofError as error:
        logger.warning("no run is marked as the promoted model's: %s", error)
        return None


def _ranked(
    path: Path,
    manifest: RunManifest,
    own: _Evaluated | None,
    scored: dict[str, tuple[dict[str, Any], str]],
    champion: tuple[str, str | None],
) -> RankedRun:
    if own is not None and own.runs[-1]["predictions_sha256"] != manifest.predictions_sha256:
        own = None  # of answers that were there before
    scores, policy = scored.get(manifest.predictions_sha256, (None, None))
    if own is not None:
        scores, policy = own.runs[-1], own.error_rows
    model = Path(manifest.identity.model.model_id)
    report_path = EvaluationFiles(path).report_path
    return RankedRun(
        path=path,
        manifest=manifest,
        scores=None if scores is None else RunSummary.model_validate(scores),
        error_policy=policy,
        decision=None if own is None else own.decision,
        promoted=(model.parent.name, model.name) == champion,
        report_path=report_path if own is not None and report_path.is_file() else None,
    )


def _groups(runs: list[RankedRun]) -> Iterator[RunGroup]:
    newest_first = sorted(runs, key=lambda run: (run.manifest.finish_order, run.path.name), reverse=True)
    groups: dict[str, list[RankedRun]] = {}
    for run in newest_first:
        groups.setdefault(run.manifest.identity.rows_sha256, []).append(run)
    for rows_sha256, members in groups.items():
        metrics = _metrics(members)
        if metrics and metrics[0].direction != "none":
            members.sort(key=partial(_rank, metric=metrics[0]))
        manifest = members[0].manifest
        yield RunGroup(rows_sha256, manifest.row_count, manifest.dataset_id, _with_settings(members), metrics)


def _rank(run: RankedRun, metric: MetricSummary) -> tuple[bool, float]:
    value = run.value(metric.name)
    sign = 1 if metric.direction == "lower" else -1
    return (True, 0.0) if value is None else (False, sign * value)


def _metrics(newest_first: list[RankedRun]) -> tuple[MetricSummary, ...]:
    """Metrics of the group: first those of the newest scored run, in its order; then those of others.

    Those that only describe, such as lengths, come after those that have a better and a worse.
    """
    found: dict[str, MetricSummary] = {}
    for run in newest_first:
        for metric in run.scores.metrics if run.scores else ():
            found.setdefault(metric.name, metric)
    return tuple(sorted(found.values(), key=lambda metric: metric.direction == "none"))


def _with_settings(runs: list[RankedRun]) -> tuple[RankedRun, ...]:
    """Give each run those of its settings that not all runs of the group share."""
    contents = [{name: str(value) for name, value in run.manifest.identity.content().items()} for run in runs]
    uses = Counter(pair for content in contents for pair in content.items())
    return tuple(
        replace(
            run,
            settings=tuple(
                (name, value)
                for name, value in content.items()
                if name not in _NOT_SETTINGS and uses[name, value] < len(runs)
            ),
        )
        for run, content in zip(runs, contents, strict=True)
    )
