"""The scores of one run: its rows, its origin, and its table of scores by the metrics of the settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.answers import read_answers
from tasks.core.evaluation.figures import summarize_metrics
from tasks.core.evaluation.pairs import score_pairs
from tasks.core.evaluation.scoring import ScoreTable, score_predictions
from tasks.core.evaluation.summary import EvaluationSettings, RunSummary
from tasks.core.metrics.catalogue import family_of, resolve
from tasks.core.metrics.metric import ScoredRun, Sources
from tasks.core.records import Prediction, RunManifest
from tasks.core.runs.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Answered:
    """The published answers of a run, found whole, and the manifest where they are those of a run directory."""

    predictions_path: Path
    sha256: str
    manifest: RunManifest | None


@dataclass(frozen=True, slots=True)
class RunScoring:
    """Scores runs (directories or files of answers) by the same settings; `directory` gets the results.

    Each run's answers are compared with their digest once. What was compared is kept in `seen`.
    """

    settings: EvaluationSettings
    directory: Path
    sources: Sources
    processes: int = 1
    seen: dict[Path, Answered] = field(default_factory=dict)

    def answered(self, run_path: Path) -> Answered:
        """The answers of a run. Raises EvaluationError when they are missing or damaged."""
        if run_path not in self.seen:
            self.seen[run_path] = answered(run_path)
        return self.seen[run_path]

    def predictions(self, run_path: Path) -> Iterator[Prediction]:
        """The rows of a run. Raises EvaluationError when they are missing or damaged."""
        return read_answers(self.answered(run_path).predictions_path, self.settings.thought_markers)

    def table(self, run_path: Path) -> ScoreTable:
        """Score every row. Raises EvaluationError when the predictions are missing or damaged."""
        manifest = self.answered(run_path).manifest
        scored_run = ScoredRun(self.sources, None)
        if manifest is not None:
            references_path = RunDir(run_path).references_path
            told = manifest.references_sha256, manifest.reference_tokens
            scored_run = ScoredRun(self.sources, references_path, *told)
        return score_predictions(
            self.predictions(run_path),
            resolve(self.settings.metrics, scored_run),
            error_rows=self.settings.error_rows,
            processes=self.processes,
        )

    def against(
        self, candidate_path: Path, table: ScoreTable, other_path: Path
    ) -> tuple[ScoreTable, ScoreTable]:
        """The candidate's and another run's scores, with those of metrics that compare both runs' answers."""
        other = self.table(other_path)
        families = [found for name in self.settings.metrics if (found := family_of(name)) and found.pairs]
        if not families:
            return table, other
        mine, theirs = self.predictions(candidate_path), self.predictions(other_path)
        return score_pairs((table, other), (mine, theirs), families, self.sources, self.settings.error_rows)

    def summary(self, run_path: Path, table: ScoreTable) -> RunSummary:
        """Figures of a run and where its answers came from."""
        answers = self.answered(run_path)
        manifest = answers.manifest
        run = RunSummary(
            run_name=manifest.run_name if manifest else run_path.stem,
            predictions_path=Path(os.path.relpath(answers.predictions_path, self.directory)).as_posix(),
            predictions_sha256=answers.sha256,
            rows=table.row_count,
            distinct_questions=len(set(table.questions.tolist())),
            error_rows=int(table.errors.sum()),
            truncated_rows=int(table.truncated.sum()),
            cut_in_thoughts_rows=int(table.cut_in_thoughts.sum()),
            metrics=summarize_metrics(table, self.settings),
        )
        return run if manifest is None else run.model_copy(update=_origin(manifest))


def answered(run_path: Path) -> Answered:
    """Find a run's answers and compare them with their digest.

    Raises EvaluationError when there is no such run, it is not finished, or its answers were changed.
    """
    if run_path.is_file():
        with run_path.open("rb") as file:
            return Answered(run_path, hashlib.file_digest(file, "sha256").hexdigest(), None)
    if not run_path.is_dir():
        raise EvaluationError(
            f"there is no run at {run_path}",
            "run `tuneproof infer` first; `tuneproof runs` lists what is there",
        )
    run = RunDir(run_path)
    manifest = run.read_manifest()
    if run.finished_manifest() is None:
        raise EvaluationError(
            f"{run.predictions_path} was changed after its run: its digest is not the manifest's",
            "run `tuneproof infer` again to publish it anew; answers that are there are not generated again",
        )
    return Answered(run.predictions_path, manifest.predictions_sha256, manifest)


def _origin(manifest: RunManifest) -> dict[str, object]:
    """What the manifest tells of a run under the same names, and what has other ones."""
    same = (RunSummary.model_fields.keys() & RunManifest.model_fields.keys()) - {"predictions_path"}
    return {name: getattr(manifest, name) for name in same} | {
        "cut_prompt_rows": manifest.truncated_prompt_count,
        "completion_tokens_per_second": manifest.tokens_per_second,
    }
