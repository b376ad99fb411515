"""Evaluator: from predictions to scores, comparison and report, as a plain class that the Prefect tasks use too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

from tasks.core.config import Config, EvaluatorConfig, as_config
from tasks.core.data.sources import described_data
from tasks.core.evaluation.evaluate import evaluation_files, score_run, settings_of
from tasks.core.evaluation.gate.gate import Gating, primary_of
from tasks.core.evaluation.nights import ChallengeBook
from tasks.core.evaluation.opponents.remote_runs import (
    bring_manifests,
    bring_overview,
    bring_run,
    name_within,
    send_results,
    store_of,
    withdraw,
)
from tasks.core.evaluation.opponents.run_lookup import (
    NAMELESS_OPPONENTS,
    ComparedRuns,
    FinishedRun,
    find_opponents,
    locate_run,
    newest_run,
)
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary
from tasks.core.evaluation.run_scoring import answered
from tasks.core.evaluation.summary import EvaluationSummary, RunSummary
from tasks.core.links import refuse_links_out
from tasks.core.metrics.catalogue import reported, resolve
from tasks.core.metrics.judge.judge import Progress
from tasks.core.metrics.metric import Metric
from tasks.core.metrics.models.scoring_models import ScoringModels
from tasks.core.models.trained.champion import current_champion
from tasks.core.promotion.promotion import champions
from tasks.core.report.writing import report_run
from tasks.core.runs.run_dir import RunDir
from tasks.core.storage.store import Store, is_url

logger = logging.getLogger(__name__)


class Evaluator:
    """Scores a run and compares it with another. Every method may be called on its own.

    A model is used only by metrics that need one: a judge, an embedding model.

    `config_manager` is a Config, the path of a TOML file, or None for ./config.toml and defaults. `run` and
    `baseline` are run names or paths and override the config's. `opponents` are folders of runs that were made to be
    compared with: other runs are searched only for an opponent that is not among them. `judge_api_key` is for a key
    that is kept elsewhere than in the environment. `run()` does all steps in order:

        find_runs -> score -> report
    """

    def __init__(
        self,
        config_manager: Config | Path | str | None = None,
        *,
        run: str | Path | None = None,
        baseline: str | Path | None = None,
        opponents: Sequence[Path] = (),
        judge_api_key: SecretStr | None = None,
    ) -> None:
        self.config = as_config(config_manager)
        self.judge_api_key = judge_api_key
        self.on_progress: Progress | None = None
        """Told how many verdicts of the judge are there, of how many."""
        self._run = run
        self._baseline = baseline
        self._opponents = tuple(opponents)
        self._found: ComparedRuns | None = None

    @property
    def settings(self) -> EvaluatorConfig:
        """The section [evaluator]."""
        return self.config.evaluator

    @property
    def runs(self) -> Store:
        """Where the candidate is kept: beside a run that is given by its URL, else where the settings say."""
        return store_of(self._run, self.config.pipeline.runs_dir)

    def find_runs(self) -> ComparedRuns:
        """Find candidate and baseline, once. Raises EvaluationError when a named run does not exist."""
        if self._found is None:
            runs_dir, models = self.runs.local, Store(self.config.pipeline.models_dir)
            bring_manifests(self.runs)
            candidate = self.candidate_path()
            bring_run(self.runs, candidate)
            if candidate.parent == runs_dir and candidate.is_dir():
                refuse_links_out(candidate)
            baseline = str(self._baseline or self.settings.baseline)
            known = [FinishedRun(path, RunDir(path).read_manifest()) for path in self._opponents]
            found = find_opponents(baseline, candidate, models, runs_dir, known)
            for reason in filter(None, (found.no_baseline_reason, found.missing_champion)):
                logger.warning("not compared: %s", reason)
            for path in (found.baseline_path, found.champion_path):
                bring_run(self.runs, path)
            self._found = found
        return self._found

    def candidate_path(self) -> Path:
        """The named run, else the evaluator's, else the inferencer's, else the newest one, of those that are here."""
        runs_dir = self.runs.local
        if self._run is not None:
            return locate_run(name_within(self._run), runs_dir)
        for section in (self.config.evaluator, self.config.inferencer):
            if section.run_name is not None:
                return locate_run(section.full_run_name(section.run_name), runs_dir)
        data_id = self.config.inferencer.testing_data_id
        return newest_run(runs_dir, None if data_id is None else described_data(data_id))

    def earlier_summary(self) -> EvaluationSummary | None:
        """Return what was found before about these very answers; None when they, an opponent or a setting are new.

        A candidate that has become the champion keeps the verdict that led to it. Raises EvaluationError when an
        opponent's answers are damaged.
        """
        runs = self.find_runs()
        files = evaluation_files(runs.candidate_path)
        if not (files.summary_path.is_file() and files.report_path.is_file()):
            return None
        summary = read_summary(files.summary_path)
        known = (
            _same_answers(runs.candidate_path, summary.candidate)
            and summary.settings == settings_of(self.settings)
            and self._same_opponents(runs, summary)
            and (summary.verdict is None or not self.settings.judged_metrics or self._same_standings(summary))
            and not summary.without_verdicts
        )
        return summary if known else None

    def _same_standings(self, earlier: EvaluationSummary) -> bool:
        """Whether the judge may decide by the same metrics for the same reasons: it may be calibrated by now."""
        return self.models().standings() == earlier.judges

    def _same_opponents(self, runs: ComparedRuns, earlier: EvaluationSummary) -> bool:
        """Whether the gate would look at the same opponents by the same rules again."""
        verdict = earlier.verdict
        if verdict is not None and verdict.settings != self.config.gate.model_dump(mode="json"):
            return False
        missing = runs.missing_champion
        if verdict is not None and missing and missing != verdict.missing_champion:
            return False
        opponents = (runs.baseline_path, earlier.baseline), (runs.champion_path, earlier.champion)
        return all(path == runs.candidate_path or _same_answers(path, run) for path, run in opponents)

    def models(self) -> ScoringModels:
        """Return the models that metrics may ask for; each is made when it is asked for."""
        return ScoringModels(self.settings, api_key=self.judge_api_key, on_progress=self.on_progress)

    def check_metrics(self, *, runs_code: bool = True) -> Metric | None:
        """Give the metric that will decide; loads nothing but, where it `runs_code`, modules of the user's own metrics.

        Raises a TuneproofError for a metric that does not exist, or a gate that cannot be.
        """
        return primary_of(reported(resolve(self.settings.metrics, runs_code=runs_code)), self.config.gate)

    def check_runs(self, *, candidate: bool = True) -> None:
        """Raise EvaluationError when the run or a named baseline is not there; nothing is brought from a URL.

        Without `candidate` only the baseline is looked for. Raises ModelLoadError as `check` does.
        """
        if not Store(self.config.pipeline.models_dir).is_remote:
            self._check_champion()
        if self.runs.is_remote:
            return
        if candidate:
            _check_readable(self.candidate_path())
        baseline = str(self._baseline or self.settings.baseline)
        if baseline not in NAMELESS_OPPONENTS and not is_url(baseline):
            _check_readable(locate_run(baseline, self.runs.local))

    def check(self) -> None:
        """Raise a TuneproofError for a metric or gate that cannot be, or that lacks key, package or model.

        Also where nobody can say which model is promoted. Calls no model and needs no run, so it can be done before
        hours of training.
        """
        self.check_metrics()
        self.models().check()
        self._check_champion()

    def _check_champion(self) -> None:
        models = Store(self.config.pipeline.models_dir)
        current_champion(models)
        ChallengeBook(models).check()

    def score(self) -> EvaluationSummary:
        """Score and compare; write `scores.jsonl` and the summary."""
        runs = self.find_runs()
        bring_overview(self.runs)  # what champions before scored
        summary = score_run(
            runs.candidate_path,
            runs.baseline_path,
            self.settings,
            runs.trained,
            no_baseline_reason=runs.no_baseline_reason,
            gating=Gating(
                self.config.gate,
                runs.baseline_kind,
                runs.champion_path,
                runs.missing_champion,
                ChallengeBook(Store(self.config.pipeline.models_dir)),
                champions(Store(self.config.pipeline.models_dir)),
                self.runs.local,
            ),
            models=self.models(),
        )
        files = evaluation_files(runs.candidate_path)
        withdraw(self.runs, (files.report_path, files.spreadsheet_path))
        send_results(self.runs, runs.candidate_path)
        return summary

    def report(self) -> EvaluationFiles:
        """Write report and spreadsheet from the scores that are there; calls no model and scores nothing."""
        files = report_run(self.find_runs().candidate_path)
        send_results(self.runs, files.directory)
        return files

    def run(
        self, candidate_run: str | Path | None = None, baseline_run: str | Path | None = None
    ) -> EvaluationSummary:
        """Do all steps for the given runs, or for those of the constructor and the config."""
        if candidate_run is not None or baseline_run is not None:
            self._run, self._baseline = candidate_run or self._run, baseline_run or self._baseline
            self._found = None
        summary = self.score()
        files = self.report()
        logger.info("%s Report: %s", summary.answer, files.report_path)
        return summary


def _check_readable(path: Path) -> None:
    if path.is_dir():
        RunDir(path).read_manifest()


def _same_answers(path: Path | None, earlier: RunSummary | None) -> bool:
    if path is None or earlier is None:
        return path is None and earlier is None
    if answered(path).sha256 != earlier.predictions_sha256:
        return False
    if not path.is_dir():
        return True
    manifest = RunDir(path).read_manifest()  # references may have been scored since
    scored = manifest.reference_perplexity, manifest.reference_tokens, manifest.reference_scorer
    return scored == (earlier.reference_perplexity, earlier.reference_tokens, earlier.reference_scorer)


__all__ = ["ComparedRuns", "Evaluator"]
