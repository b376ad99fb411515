"""One evaluation: score, compare, write. Works on files; only metrics that need a model use one."""

from __future__ import annotations

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
from tasks.core.evaluation.summary import (
    ChampionPoint,
    EvaluationSettings,
    EvaluationSummary,
    OverlapSummary,
    TrainingSummary,
)
from tasks.core.leftovers import remove_leftovers
from tasks.core.metrics.catalogue import reported, resolve
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
    leading = None if primary is None else primary.name
    models = models or ScoringModels(config)
    scoring = RunScoring(settings, files.directory, models, config.scoring_processes)
    try:
        models.probe()
        table = scoring.table(candidate_dir)
        baseline_table = baseline = comparison = None
        if baseline_dir is not None:
            table, baseline_table = scoring.against(candidate_dir, table, baseline_dir)
            baseline = scoring.summary(baseline_dir, baseline_table)
            comparison = compare_tables(table, baseline_table, settings)
        champion = champion_comparison = None
        if gating is not None and gating.champion_dir is not None:
            against_champion, champion_table = scoring.against(candidate_dir, table, gating.champion_dir)
            champion = scoring.summary(gating.champion_dir, champion_table)
            champion_comparison = compare_tables(against_champion, champion_table, settings)
        repeat_dir = None if gating is None else find_repeat(candidate_dir)
        repeated = None if repeat_dir is None else scoring.table(repeat_dir)
        judges = () if gating is None else models.standings()
    finally:
        models.close()
    candidate = scoring.summary(candidate_dir, table)
    overlap = training_overlap(model_manifest, scoring.predictions(candidate_dir), files.directory)
    summary = EvaluationSummary(
        answer=wording.headline(candidate, baseline, comparison, settings.confidence, leading),
        notes=(
            *wording.notes(candidate, baseline, comparison, no_baseline_reason, leading),
            *wording.model_notes(models.judge_usage, models.embedding_usage),
        ),
        candidate=candidate,
        baseline=baseline,
        comparison=comparison,
        champion=champion,
        champion_comparison=champion_comparison,
        overlap=overlap if isinstance(overlap, OverlapSummary) else None,
        judge=models.judge_usage,
        judges=judges,
        embedding=models.embedding_usage,
        training=_training(model_manifest),
        settings=settings,
        evaluated_at=now(),
        tuneproof_version=library_version("tuneproof"),
        library_versions=library_versions(_LIBRARIES),
    )
    if summary.without_verdicts:
        summary = summary.model_copy(update={"notes": (wording.no_verdicts(summary), *summary.notes)})
    if gating is not None and primary is not None:
        noise = noise_floor(candidate_dir, table, repeated, primary)
        known = Known(primary, table, noise, overlap, model_manifest)
        summary = summary.model_copy(update={"verdict": reach_verdict(summary, gating, known)})
        summary = summary.model_copy(update={"champions": _champions(gating, summary, primary.name)})
    scores_sha256 = write_scores(files.scores_path, row_scores(table, baseline_table))
    summary = summary.model_copy(update={"scores_sha256": scores_sha256})
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
