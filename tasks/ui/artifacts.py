"""What the Prefect UI shows of a run: tables, a summary, links and progress. A run never fails because of it."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.core.config import FineTunerConfig
from tasks.core.errors import TuneproofError
from tasks.core.escaping import visible
from tasks.core.evaluation.summary import (
    Comparison,
    EvaluationSummary,
    GateCheck,
    MetricSummary,
    Verdict,
)
from tasks.core.evaluation.wording import label, percent, shown_change, shown_metric
from tasks.core.promotion.promotion import Promotion
from tasks.core.records import ModelManifest, Prediction
from tasks.core.report.lineage import lineage_markdown
from tasks.core.report.plots import data_uri, loss_plot
from tasks.core.storage.store import Store, is_url
from tasks.finetuner import best_text
from tasks.server.telling import courier

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 10
_CELL_LENGTH = 300
_KEY_LENGTH = 90
_OPPONENTS = {"base": "its base model's run", "champion": "the champion's run", "run": "the run"}
_PREVIEWED_ROWS = 3
_UPDATE_INTERVAL_SECONDS = 1.0
_TEXT_INTERVAL_SECONDS = 10.0


class ProgressArtifact:
    """A bar in the Prefect UI, updated when it moves by a percent, at most once a second, or every ten seconds."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = artifact_key(key), description
        self._artifact_id: UUID | None = None
        self._percent = -1.0
        self._updated = 0.0

    def show(self, done: float, total: float, text: str) -> None:
        """Show how far the work is; the end is always shown."""
        percent = 100.0 * min(1.0, done / total) if total else 100.0
        age_seconds = time.monotonic() - self._updated
        moved = percent - self._percent >= 1 or age_seconds >= _TEXT_INTERVAL_SECONDS
        if percent < 100 and (age_seconds < _UPDATE_INTERVAL_SECONDS or not moved):
            return
        if percent == self._percent == 100:
            return
        description = f"{self._description}: {text}"
        courier().send("progress", partial(self._tell, percent, description), replaces=self)
        self._percent, self._updated = percent, time.monotonic()

    def _tell(self, percent: float, description: str) -> None:
        if self._artifact_id is None:
            made = create_progress_artifact(percent, key=self._key, description=description)
            self._artifact_id = cast(UUID, made)  # a coroutine only where an event loop runs
        else:
            update_progress_artifact(self._artifact_id, percent, description=description)


def show_sample_predictions(run_name: str, predictions: Iterable[Prediction]) -> None:
    """Show the first answers as a table, with their thoughts where there are any."""
    shown = list(itertools.islice(predictions, SAMPLE_ROWS))
    thinks = any(prediction.reasoning for prediction in shown)
    rows = [
        {
            "question": _cell(prediction.question),
            "answer": _cell(prediction.predicted_answer),
            "reference": _cell(prediction.ground_truth),
            "error": _cell(prediction.error),
        }
        | ({"thoughts": _cell(prediction.reasoning)} if thinks else {})
        for prediction in shown
    ]
    description = f"First {len(rows)} answers of the run {run_name}"
    _show(create_table_artifact, f"sample-{run_name}", description, table=rows)


def show_losses(manifest: ModelManifest) -> None:
    """Show the course of the losses as a picture and as a table, and which update's weights became the model."""
    losses, run_name = manifest.losses, manifest.run_name
    if not losses:
        return
    rows = [point.model_dump() for point in losses]
    description = f"Training losses of {run_name}{best_text(manifest)}"
    _show(create_table_artifact, f"loss-{run_name}", description, table=rows)
    plot = data_uri(loss_plot(losses, manifest.best_step))
    _show(create_image_artifact, f"loss-plot-{run_name}", description, image_url=plot)


def show_prompts(run_name: str, settings: FineTunerConfig) -> None:
    """Show the first training rows as the model got them, and what was learnt of them."""
    from tasks.core.prompts.preview import markdown
    from tasks.previewing import preview_training

    try:
        text = markdown([preview_training(settings, _PREVIEWED_ROWS)])
    except TuneproofError as error:  # data that was there at the beginning may be gone after hours
        logger.warning("the prompts could not be shown: %s", error.what)
        return
    _show_text(f"prompts-{run_name}", f"The first rows that {run_name} learnt", text)


def show_scores(run_name: str, summary: EvaluationSummary) -> None:
    """Show the scores before and after with their intervals, and the verdict if there is one."""
    _show_text(f"scores-{run_name}", summary.answer, scores_markdown(summary))
    verdict = summary.verdict
    if verdict is not None:
        told = f"{verdict.decision}: {verdict.reasons[0]}" if verdict.reasons else verdict.decision
        _show_text(f"verdict-{run_name}", told, verdict_markdown(summary, verdict))


def show_lineage(summary: EvaluationSummary, directory: Path) -> None:
    """Show where the scores come from: data, model, answers, scores, verdict."""
    run_name = summary.candidate.run_name
    text = lineage_markdown(summary, directory)
    _show_text(f"lineage-{run_name}", f"Where the scores of {run_name} come from", text)


def show_file(kind: str, run_name: str, path: Path, store: Store | None = None) -> None:
    """Link to a file: at the store's URL, else on the machine that ran the flow."""
    link, place = file_link(path, store)
    text = f"{run_name}/{path.name}"
    _show(create_link_artifact, f"{kind}-{run_name}", f"{kind}: {place}", link=link, link_text=text)


def file_link(path: Path, store: Store | None) -> tuple[str, str]:
    """Return the link to a file and how a person would write its place."""
    address = store.url_of(path) if store is not None else str(path)
    return (address, address) if is_url(address) else (path.resolve().as_uri(), str(path))


def show_promotion(promotion: Promotion) -> None:
    """Show which model is promoted, since when, by whom and why."""
    evidence = promotion.evidence
    verdict = None if evidence is None else evidence.verdict
    lines = [
        f"# {promotion.run_name} is promoted",
        "",
        f"{promotion.promoted_at}, by {promotion.promoted_by}",
        "",
    ]
    lines += [f"Reason given: {promotion.reason}", ""] if promotion.reason else []
    lines += [f"- {reason}" for reason in (verdict.reasons if verdict else ())]
    _show_text("promoted", f"promoted: {promotion.run_name}", "\n".join(lines))


def verdict_markdown(summary: EvaluationSummary, verdict: Verdict) -> str:
    """Give the verdict as markdown: the decision, what it rests on, every check, the finding."""
    lines = [f"# {verdict.decision.capitalize()}: {summary.candidate.run_name}", ""]
    lines += [f"Against {_OPPONENTS[verdict.against]} `{verdict.against_run}`.", ""]
    # The reasons to promote are all the checks, which follow.
    told = verdict.reasons[:1] if verdict.decision == "promote" else verdict.reasons
    lines += [*(f"- {reason}" for reason in (*told, *verdict.notes)), ""]
    # Else the verdict has told it.
    lines += [summary.answer, ""] if verdict.against == "champion" else []
    # A list: the UI does not wrap long cells of a table.
    lines += [
        "## Checks",
        "",
        *(f"- **{check.outcome}**: {_told_once(check)}" for check in verdict.checks),
    ]
    return "\n".join(lines)


def _told_once(check: GateCheck) -> str:
    return check.detail if check.detail.startswith(check.name) else f"{check.name}. {check.detail}"


def scores_markdown(summary: EvaluationSummary) -> str:
    """Give the summary as markdown: the finding, one row a metric with what it was compared with, the notes."""
    lines = [f"# {summary.candidate.run_name}", "", summary.answer, ""]
    compared = summary.opponents
    lines += [f"{title.capitalize()}: `{run.run_name}`  " for _, title, run, _ in compared]
    changes = ["change" if title == "before" else f"change from {title}" for _, title, _, _ in compared]
    columns = ["metric", *(title for _, title, _, _ in compared), "after" if compared else "score", *changes]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for metric in summary.candidate.metrics:
        figures = [*(run.metric(metric.name) for _, _, run, _ in compared), metric]
        cells = [label(metric.name), *map(shown_metric, figures)]
        cells += [_change(comparison, metric) for *_, comparison in compared]
        lines.append(f"| {' | '.join(cells)} |")
    interval = f"{percent(summary.settings.confidence)} interval"
    lines += ["", f"{summary.candidate.rows:,} rows; in brackets the {interval}."]
    lines += ["", *(f"- {note}" for note in summary.notes)] if summary.notes else []
    return "\n".join(lines)


def artifact_key(text: str) -> str:
    """Make a key of lowercase letters, digits and dashes, as Prefect asks for."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_KEY_LENGTH].strip("-")


def _change(comparison: Comparison | None, metric: MetricSummary) -> str:
    change = comparison.metric(metric.name) if comparison else None
    if change is None:
        return ""
    told = shown_change(change, metric)
    return f"**{told}**" if told and change.better != "undecided" else told


def _cell(text: str | None) -> str:
    text = visible(text or "")
    return text if len(text) <= _CELL_LENGTH else f"{text[:_CELL_LENGTH]}…"


def _show_text(name: str, description: str, text: str) -> None:
    _show(create_markdown_artifact, name, description, markdown=visible(text))


def _show(create: Callable[..., object], name: str, description: str, **content: object) -> None:
    """Let an artifact be created; a run neither waits for it nor fails because of it."""
    artifact = partial(create, key=artifact_key(name), description=description, **content)
    courier().send("an artifact", artifact)
