"""One evaluation: score, compare, write. Works on files; only metrics that need a model use one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.config import given_markers
from tasks.core.config.changes import changes_of
from tasks.core.errors import EvaluationError
from tasks.core.evaluation import wording
from tasks.core.evaluation.comparison import compare_tables
from tasks.core.evaluation.contamination import training_overlap
from tasks.core.evaluation.gate.gate import Gating, Known, primary_of, reach_verdict
from tasks.core.evaluation.noise import find_repeat, noise_floor
from tasks.core.evaluation.opponents.champions import champion_line
from tasks.core.evaluation.outputs import (
    EvaluationFiles,
    row_scores,
    write_scores,
    write_summary,
)
from tasks.core.evaluation.run_scoring import RunScoring
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import (
    ChampionPoint,
    Comparison,
    EvaluationSettings,
    EvaluationSummary,
    OverlapSummary,
    RunSummary,
    TrainingSummary,
)
from tasks.core.leftovers import remove_leftovers
from tasks.core.metrics.catalogue import reported, resolve
from tasks.core.metrics.metric import Metric
from tasks.core.metrics.models.scoring_models import ScoringModels
from tasks.core.provenance import library_version, library_versions, now
from tasks.core.records import ModelManifest

if TYPE_CHECKING:
    from tasks.core.config import EvaluatorConfig

_LIBRARIES = ("numpy", "scipy", "sacrebleu", "regex")


def score_run(
    candidate_dir: Path,
    baseline_dir: Path | None,
    config: EvaluatorConfig,
    model_manifest: ModelManifest | None = None,
    *,
    no_baseline_reason: str | None = None,
    gating: Gating | None = None,
    files: EvaluationFiles | None = None,
    models: ScoringModels | None = None,
) -> EvaluationSummary:
    """Score and compare; write `scores.jsonl` and `evaluator_output_summary.json`.

    `no_baseline_reason` tells readers why there is no baseline where one was wanted. With `gating` the champion
    is compared too, if there is one, and there is a verdict. `files` says where results go if not beside the
    candidate's answers; `models` are those that metrics may ask for.
    """
    files = files or evaluation_files(candidate_dir)
    remove_leftovers(files.directory)
    settings = settings_of(config)
    primary = None if gating is None else primary_of(reported(resolve(settings.metrics)), gating.settings)
    models = models or ScoringModels(config)
    scoring = RunScoring(settings, files.directory, models, config.scoring_processes)
    try:
        models.probe()
        found = _scored(scoring, candidate_dir, baseline_dir, gating)
        judges = () if gating is None else models.standings()
    finally:
        models.close()
    overlap = training_overlap(model_manifest, scoring.predictions(candidate_dir), files.directory)
    summary = _summary(found, settings, models, no_baseline_reason, primary).model_copy(
        update={
            "overlap": overlap if isinstance(overlap, OverlapSummary) else None,
            "judges": judges,
            "training": _training(model_manifest),
        }
    )
    if gating is not None and primary is not None:
        noise = noise_floor(candidate_dir, found.table, found.repeated, primary)
        known = Known(primary, found.table, noise, overlap, model_manifest)
        summary = summary.model_copy(update={"verdict": reach_verdict(summary, gating, known)})
        summary = summary.model_copy(update={"champions": _champions(gating, summary, primary.name)})
    return _written(files, summary, found)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The candidate against one other run; `table` has the candidate's scores, with what a judge says of the pair."""

    table: ScoreTable
    other_table: ScoreTable
    other: RunSummary
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class _Scored:
    """All runs of an evaluation; `table` and `candidate` are those of the pair with the baseline, if there is one."""

    table: ScoreTable
    candidate: RunSummary
    baseline: _Pair | None
    champion: _Pair | None
    repeated: ScoreTable | None


def _scored(
    scoring: RunScoring, candidate_dir: Path, baseline_dir: Path | None, gating: Gating | None
) -> _Scored:
    table = scoring.table(candidate_dir)
    baseline = _pair(scoring, candidate_dir, table, baseline_dir)
    table = table if baseline is None else baseline.table
    champion = _pair(scoring, candidate_dir, table, None if gating is None else gating.champion_dir)
    repeat_dir = None if gating is None else find_repeat(candidate_dir)
    repeated = None if repeat_dir is None else scoring.table(repeat_dir)
    return _Scored(table, scoring.summary(candidate_dir, table), baseline, champion, repeated)


def _pair(
    scoring: RunScoring, candidate_dir: Path, table: ScoreTable, other_dir: Path | None
) -> _Pair | None:
    if other_dir is None:
        return None
    own, other = scoring.against(candidate_dir, table, other_dir)
    comparison = compare_tables(own, other, scoring.settings)
    return _Pair(own, other, scoring.summary(other_dir, other), comparison)


def _summary(
    found: _Scored,
    settings: EvaluationSettings,
    models: ScoringModels,
    no_baseline_reason: str | None,
    primary: Metric | None,
) -> EvaluationSummary:
    """What was found, in figures and words; without a verdict."""
    candidate, leading = found.candidate, None if primary is None else primary.name
    baseline = found.baseline.other if found.baseline else None
    comparison = found.baseline.comparison if found.baseline else None
    summary = EvaluationSummary(
        answer=wording.headline(candidate, baseline, comparison, settings.confidence, leading),
        notes=(
            *wording.notes(candidate, baseline, comparison, no_baseline_reason, leading),
            *wording.model_notes(models.judge_usage, models.embedding_usage),
        ),
        candidate=candidate,
        baseline=baseline,
        comparison=comparison,
        champion=found.champion.other if found.champion else None,
        champion_comparison=found.champion.comparison if found.champion else None,
        judge=models.judge_usage,
        embedding=models.embedding_usage,
        training=None,
        settings=settings,
        evaluated_at=now(),
        tuneproof_version=library_version("tuneproof"),
        library_versions=library_versions(_LIBRARIES),
    )
    if not summary.without_verdicts:
        return summary
    return summary.model_copy(update={"notes": (wording.no_verdicts(summary), *summary.notes)})


def _written(files: EvaluationFiles, summary: EvaluationSummary, found: _Scored) -> EvaluationSummary:
    """Write scores and summary; the summary with the digest of the scores."""
    rows = row_scores(found.table, found.baseline.other_table if found.baseline else None)
    summary = summary.model_copy(update={"scores_sha256": write_scores(files.scores_path, rows)})
    # Those of an earlier evaluation; this one's are written when its summary is there.
    for path in (files.report_path, files.spreadsheet_path):
        path.unlink(missing_ok=True)
    write_summary(files.summary_path, summary)
    return summary


def _champions(gating: Gating, summary: EvaluationSummary, metric: str) -> tuple[ChampionPoint, ...]:
    """The line of champions on the candidate's rows; the one of today has been scored just now."""
    identity = summary.candidate.identity
    if identity is None or not gating.champions:
        return ()
    line = champion_line(gating.champions, gating.runs_dir, identity.rows_sha256, metric)
    last, champion = line[-1], summary.champion
    if champion is not None and last.score is None:
        line = (*line[:-1], last.model_copy(update={"score": champion.metric(metric)}))
    return line


def settings_of(config: EvaluatorConfig) -> EvaluationSettings:
    """What the figures of an evaluation with these settings depend on: what the section declares to change them.

    Settings of a judge, an embedding model or bert_score that no metric asks for are as if they were not set.
    """
    given, defaults = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    declared = changes_of(type(config)).items()
    figures = {
        key: changes for key, changes in declared if changes.effect == "figures" and not changes.within
    }
    values = {
        key: (given if changes.used_by is None or config.metrics_asking(changes.used_by) else defaults)[key]
        for key, changes in figures.items()
    }
    values["thought_markers"] = given_markers(config.thought_markers)
    named = {key: value for key, value in values.items() if key in EvaluationSettings.model_fields}
    others = {key: value for key, value in values.items() if key not in named and value != defaults[key]}
    return EvaluationSettings.model_validate({**named, "others": others})


def require_verdicts(summary: EvaluationSummary, report_path: Path) -> None:
    """Raise EvaluationError when a judged metric has no verdict on any row; what was found is written by then."""
    if summary.without_verdicts:
        raise EvaluationError(
            wording.no_verdicts(summary),
            f"let the judge's endpoint answer, then evaluate again (docs/judge.md); other scores: {report_path}",
        )


def evaluation_files(candidate_dir: Path) -> EvaluationFiles:
    """Where results go: into the run directory; for a single file of predictions, a folder beside it."""
    if candidate_dir.is_file():
        return EvaluationFiles(candidate_dir.with_suffix(".evaluation"))
    return EvaluationFiles(candidate_dir)


def _training(manifest: ModelManifest | None) -> TrainingSummary | None:
    if manifest is None:
        return None
    return TrainingSummary(**{name: getattr(manifest, name) for name in TrainingSummary.model_fields})
