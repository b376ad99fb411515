"""What the commands print when they are done: where the files are, the scores, what there is."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.console import say, show_table
from tasks.core.errors import ConfigError, TuneproofError
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from pydantic import SecretStr

    from flows.pipeline import PipelineResult
    from tasks.core.config import Config
    from tasks.core.evaluation.summary import EvaluationSummary
    from tasks.core.models.trained.registry import ModelEntry
    from tasks.core.promotion.promotion import Promotion
    from tasks.core.records import RunManifest
    from tasks.core.report.leaderboard import Leaderboard, RunGroup
    from tasks.core.training.run import TrainedModel
    from tasks.dry_run import Plan

_LISTED_METRICS = 3


def show_model(trained: TrainedModel) -> None:
    """Tell where the model is and how its training went."""
    from tasks.core.report.html_page import duration
    from tasks.finetuner import best_text

    manifest = trained.manifest
    loss = "" if manifest.final_loss is None else f", last loss {manifest.final_loss:.3f}"
    told = f"{loss}{best_text(manifest)}"
    say(f"model: {trained.model_dir} ({manifest.steps} updates in {duration(manifest.seconds)}{told})")


def show_run(manifest: RunManifest, config: Config) -> None:
    """Tell where the answers are and how many rows have one."""
    path = Store(config.pipeline.runs_dir).address_of(f"{manifest.run_name}/{manifest.predictions_path}")
    errors = f", {manifest.error_count} of them with an error" if manifest.error_count else ""
    cut = f", {manifest.truncated_prompt_count} prompts cut to fit" if manifest.truncated_prompt_count else ""
    lost = (
        f", {manifest.cut_in_thoughts_count} cut in their thoughts" if manifest.cut_in_thoughts_count else ""
    )
    say(f"answers: {path} ({manifest.row_count} rows{errors}{cut}{lost})")


def show_scores(summary: EvaluationSummary, config: Config, *, run: str | None = None) -> None:
    """Print the scores, before and after if there is a baseline, and where the report is.

    `run` is the name or path that was evaluated, if one was given.
    """
    from tasks.core.evaluation.evaluate import evaluation_files
    from tasks.core.evaluation.opponents.remote_runs import name_within, store_of
    from tasks.core.evaluation.opponents.run_lookup import locate_run
    from tasks.core.evaluation.wording import percent, shown_metric

    candidate, baseline, champion = summary.candidate, summary.baseline, summary.champion
    compared = [
        (name, run) for name, run in (("before", baseline), ("champion", champion)) if run is not None
    ]
    columns = ["metric", *(name for name, _ in compared), "after" if compared else "score"]
    runs = [*(run for _, run in compared), candidate]
    rows = [
        [metric.name, *(shown_metric(run.metric(metric.name)) for run in runs)]
        for metric in candidate.metrics
    ]
    show_verdict(summary)
    intervals = f"{percent(summary.settings.confidence)} intervals"
    show_table(f"{candidate.run_name}: {candidate.rows} rows, {intervals}", columns, rows)
    runs_dir = store_of(run, config.pipeline.runs_dir).local
    named = candidate.run_name if run is None else name_within(run)
    files = evaluation_files(locate_run(named, runs_dir))
    _show_finding(summary, files.report_path)


def _show_finding(summary: EvaluationSummary, report_path: Path) -> None:
    if summary.verdict is None or summary.verdict.against == "champion":
        say(summary.answer)  # else the verdict has told it
    for note in summary.notes:
        say(f"note: {note}")
    say(f"report: {report_path.resolve()}")


def show_verdict(summary: EvaluationSummary) -> None:
    """Print what the gate decided, with its reasons; nothing where nothing was compared."""
    verdict = summary.verdict
    if verdict is None:
        return
    first, *others = verdict.reasons
    say(f"verdict: {verdict.decision.upper()}. {first}")
    for reason in others if verdict.decision != "promote" else ():
        say(f"  {reason}")
    for note in verdict.notes:
        say(f"  note: {note}")


def end_with_verdict(summary: EvaluationSummary) -> None:
    """End the command with 3 for reject, 4 for inconclusive, 5 where there is no verdict; go on after promote."""
    codes = {"promote": 0, "reject": 3, "inconclusive": 4}
    code = 5 if summary.verdict is None else codes[summary.verdict.decision]
    if code:
        sys.exit(code)


def show_promotion(promotion: Promotion, config: Config) -> None:
    """Tell which model is promoted and how to go back."""
    from tasks.core.promotion.promotion import promotion_history

    forced = ", by force" if promotion.forced else ""
    say(f'promoted: {promotion.run_name}{forced}; it answers wherever a model is called "promoted".')
    replaced = promotion_history(Path(config.pipeline.models_dir))[-1].replaced
    back = f"goes back to {replaced}" if replaced else "takes the next promotion back; this one is the first"
    say(f"`tuneproof rollback` {back}.")


def show_rollback(promotion: Promotion, replaced: Promotion, was_cut_off: bool) -> None:
    """Tell which model is promoted again, and that a rollback which had been cut off was not done twice."""
    say(f"promoted again: {promotion.run_name}, in place of {replaced.run_name}.")
    if was_cut_off:
        say("An earlier rollback had gone this step; to go one further, run the command again.")


def show_pipeline(result: PipelineResult, config: Config) -> None:
    """Print what each phase gave."""
    if result.trained is not None:
        show_model(result.trained)
    if result.candidate is not None:
        show_run(result.candidate, config)
    if result.evaluation is not None:
        show_scores(result.evaluation, config)
    if result.promotion is not None:
        show_promotion(result.promotion, config)


def show_where_to_look() -> None:
    """Tell how to see the runs in the Prefect UI, and how the command is called with one's own data."""
    scripts = Path(sys.executable).parent
    if scripts.is_relative_to(Path.cwd()):
        scripts = scripts.relative_to(Path.cwd())
    say(
        f"Prefect UI: run `{scripts}/prefect server start` and open http://127.0.0.1:4200; these runs are in it."
    )
    say(f"your own data: {scripts}/tuneproof pipeline my.toml (`. {scripts}/activate` makes it `tuneproof`)")


def show_plan(plan: Plan) -> None:
    """Print the plan; ConfigError listing what stands in its way."""
    for phase in plan.phases:
        say(phase.name)
        for label, text in phase.facts:
            say(f"  {label}: {text}")
    if len(plan.problems) == 1:
        raise ConfigError(plan.problems[0])
    if plan.problems:
        listed = "".join("\n  - " + problem.replace("\n", "\n    ") for problem in plan.problems)
        raise ConfigError(f"{len(plan.problems)} things stand in the way:{listed}")
    say("Nothing was run: --dry-run.")


def list_models(config: Config) -> None:
    """Print the fine-tuned models, newest first."""
    from tasks.core.models.trained.model_store import list_models as models_in

    entries = models_in(Store(config.pipeline.models_dir))
    if not entries:
        say(f"No fine-tuned models in {config.pipeline.models_dir}; `tuneproof finetune` makes one.")
        return
    promoted = _promoted(Store(config.pipeline.models_dir).local)
    rows = []
    for entry in entries:
        manifest = entry.manifest
        facts = ("", "", "") if manifest is None else (
            Path(manifest.base_model_id).name, manifest.training_row_count, _number(manifest.final_loss)
        )  # fmt: skip
        rows.append((entry.run_name, *facts, _when(entry.changed_at), _state(entry, promoted)))
    columns = ("model", "base model", "rows", "last loss", "finished", "state")
    show_table(f"Models in {config.pipeline.models_dir}", columns, rows)


def _promoted(models_dir: Path) -> str | None:
    """Name of the promoted model; what is wrong with it is told, and hides no model."""
    from tasks.core.models.trained.champion import Champion, why_changed
    from tasks.core.promotion.promotion import current_promotion

    try:
        promotion = current_promotion(models_dir)
        if promotion is None:
            return None
        changed = why_changed(models_dir, Champion(promotion.run_name, promotion.weights_sha256))
    except TuneproofError as error:
        say(f"warning: {error}")
        return None
    if changed is not None:
        say(f"warning: {changed}")
    return promotion.run_name


def _state(entry: ModelEntry, promoted: str | None) -> str:
    state = entry.reason or "complete"
    return f"{state}, promoted" if entry.run_name == promoted else state


def list_promotions(config: Config) -> None:
    """Print all promotions and rollbacks, newest first; ModelLoadError for a history with a damaged line."""
    from tasks.core.models.trained.alias import HISTORY_NAME
    from tasks.core.models.trained.history import laid_aside
    from tasks.core.promotion.promotion import current_promotion, promotion_history

    models_dir = Path(config.pipeline.models_dir)
    entries = promotion_history(models_dir)
    if not entries:
        current_promotion(models_dir)  # its pointer may say that there should be some
        say(f"Nothing was promoted in {models_dir}; `tuneproof promote` does it.")
        return
    rows = [
        (
            "" if entry.at is None else _when(datetime.fromisoformat(entry.at)),
            entry.action,
            entry.promotion.run_name,
            entry.replaced,
            entry.by,
            entry.reason or _verdict_in_short(entry.promotion),
        )
        for entry in reversed(entries)
    ]
    show_table(f"Promotions in {models_dir}", ("when", "what", "model", "in place of", "by", "why"), rows)
    for path in laid_aside(models_dir / HISTORY_NAME):
        say(f"earlier ones, in a history that was damaged: {path}")
    if _promoted(models_dir) is None:
        return
    _show_champions(config, entries[-1].promotion)


def _show_champions(config: Config, present: Promotion) -> None:
    """Print what each champion scores on the rows on which the present one was promoted."""
    from tasks.core.evaluation.opponents.champions import champion_line
    from tasks.core.evaluation.wording import label, shown_metric
    from tasks.core.promotion.promotion import champions
    from tasks.core.runs.run_dir import RunDir

    evidence = present.evidence
    runs_dir = Store(config.pipeline.runs_dir).local
    if evidence is None or evidence.verdict is None or not (runs_dir / evidence.run_name).is_dir():
        return
    rows_sha256 = RunDir(runs_dir / evidence.run_name).read_manifest().identity.rows_sha256
    metric = evidence.verdict.primary_metric
    line = champion_line(champions(Path(config.pipeline.models_dir)), runs_dir, rows_sha256, metric)
    rows = [
        (point.run_name, "not scored on these rows" if point.score is None else shown_metric(point.score))
        for point in line
    ]
    title = f"Line of champions, oldest first, on the {evidence.rows:,} rows of {evidence.run_name}"
    show_table(title, ("model", label(metric)), rows)


def _verdict_in_short(promotion: Promotion) -> str:
    verdict = promotion.evidence.verdict if promotion.evidence else None
    return "" if verdict is None else verdict.reasons[0]


def list_runs(config: Config) -> Leaderboard:
    """Print the runs: one table for each set of rows, best first by its first metric; then the unfinished.

    Returns what was read of them.
    """
    from tasks.core.evaluation.opponents.remote_runs import bring_overview
    from tasks.core.report.leaderboard import read_leaderboard

    runs = Store(config.pipeline.runs_dir)
    bring_overview(runs)
    runs_dir, models_dir = runs.place, Store(config.pipeline.models_dir).local
    board = read_leaderboard(runs.local, models_dir)
    if not board.groups and not board.unfinished:
        say(f"No runs in {runs_dir}; `tuneproof infer` makes one.")
    total = sum(len(group.runs) for group in board.groups)
    for group in board.groups:
        _show_group(group, total)
    if board.unfinished:
        show_table(f"Not finished in {runs_dir}", ("run", "state"), board.unfinished)
    return board


def _show_group(group: RunGroup, total: int) -> None:
    from tasks.core.evaluation.wording import shown_metric

    metrics = [metric.name for metric in group.metrics[:_LISTED_METRICS]]
    columns = ("run", "model", *metrics, "verdict", "tokens/s", "finished")
    rows = [
        (
            run.path.name,
            run.model_name + (" (promoted)" if run.promoted else ""),
            *("" if run.scores is None else shown_metric(run.scores.metric(name)) for name in metrics),
            run.decision,
            "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            _when(datetime.fromisoformat(run.manifest.finished_at)),
        )
        for run in group.runs
    ]
    errors = sum(run.manifest.error_count for run in group.runs)
    told = f", {errors} rows with an error" if errors else ""
    is_ranked = bool(group.metrics) and group.metrics[0].direction != "none"
    ranked = f"; best {metrics[0]} first" if is_ranked else "" if metrics else "; not evaluated"
    title = f"{group.dataset}: {group.rows:,} rows ({group.rows_sha256[:8]}){told}{ranked}"
    show_table(title, columns, rows, of_rows=total)


def write_leaderboard_page(config: Config, board: Leaderboard, path: Path | None) -> None:
    """Write the leaderboard as a page; a folder gets a file `leaderboard.html`."""
    from tasks.core.report.leaderboard_page import write_leaderboard

    runs_dir = Store(config.pipeline.runs_dir).local
    path = path or runs_dir
    path = path / "leaderboard.html" if path.is_dir() or path == runs_dir else path
    write_leaderboard(path, board, runs_dir=runs_dir)
    say(f"leaderboard: {path.resolve()}")


def compare(run_a: str, run_b: str, config: Config, *, directory: Path | None, open_report: bool) -> None:
    """Compare two runs, print the scores of both with the change, and where the report is."""
    from tasks.core.evaluation.evaluate import require_verdicts
    from tasks.core.evaluation.opponents.run_lookup import find_and_bring, training_manifest
    from tasks.core.metrics.models.scoring_models import ScoringModels
    from tasks.core.report.writing import compare_runs

    runs_dir = config.pipeline.runs_dir
    before, after = find_and_bring(run_a, runs_dir), find_and_bring(run_b, runs_dir)
    summary, files = compare_runs(
        before,
        after,
        config.evaluator,
        directory=directory,
        model_manifest=training_manifest(after),
        models=ScoringModels(config.evaluator, api_key=_judge_key(config)),
    )
    _show_comparison(summary)
    _show_finding(summary, files.report_path)
    require_verdicts(summary, files.report_path)
    if open_report:
        _open(files.report_path)


def _judge_key(config: Config) -> SecretStr | None:
    """The judge's key where a Secret block keeps it; Prefect is loaded only then."""
    if not config.evaluator.judge_api_key.startswith("secret:"):
        return None
    from tasks.server.secret_blocks import judge_key_of

    return judge_key_of(config.evaluator)


def _show_comparison(summary: EvaluationSummary) -> None:
    from tasks.core.evaluation.wording import percent, shown_change, shown_metric

    comparison, baseline = summary.comparison, summary.baseline
    if comparison is None or baseline is None:
        return
    rows = []
    for metric in summary.candidate.metrics:
        change = comparison.metric(metric.name)
        if change is None:
            continue
        better = {"candidate": "better", "baseline": "worse", "undecided": ""}[change.better]
        told = shown_change(change, metric) or "not scored"
        tally = "" if change.wins is None else f"{change.wins} / {change.ties} / {change.losses}"
        before, after = shown_metric(baseline.metric(metric.name)), shown_metric(metric)
        rows.append((metric.name, before, after, told, better, tally))
    title = (
        f"{summary.candidate.run_name} against {baseline.run_name}: "
        f"{comparison.paired_rows:,} shared rows, {percent(summary.settings.confidence)} intervals"
    )
    columns = ("metric", "before", "after", "change", "", "better / equal / worse")
    show_table(title, columns, rows)


def rewrite_report(run: str, config: Config, *, open_report: bool) -> None:
    """Write report and spreadsheet from the scores that are there, and tell where."""
    from tasks.core.evaluation.opponents.remote_runs import send_results, store_of
    from tasks.core.evaluation.opponents.run_lookup import find_and_bring
    from tasks.core.report.writing import report_run

    files = report_run(find_and_bring(run, config.pipeline.runs_dir))
    send_results(store_of(run, config.pipeline.runs_dir), files.directory)
    say(f"report: {files.report_path.resolve()}")
    say(f"spreadsheet: {files.spreadsheet_path.resolve()}")
    if open_report:
        _open(files.report_path)


def _open(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        say("No browser could be started here; open the file yourself.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _when(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"
