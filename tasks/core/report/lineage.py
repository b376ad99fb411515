"""Where a verdict comes from: data, model, answers, scores, each with what identifies it."""

from __future__ import annotations

from pathlib import Path

from tasks.core.evaluation.summary import EvaluationSummary, RunSummary
from tasks.core.evaluation.wording import is_share, label, shown
from tasks.core.report.plots import Box, chain, data_uri, loss_plot

_TONES = {"promote": "good", "reject": "bad", "inconclusive": "open"}


def lineage_boxes(summary: EvaluationSummary) -> tuple[Box, ...]:
    """Data, model, answers, scores, verdict, as far as they are known, in this order."""
    run, training = summary.candidate, summary.training
    boxes = []
    if training is not None:
        boxes.append(
            Box("training data", (_name(training.training_data_id), f"{training.training_row_count:,} rows"))
        )
        steps = f"{training.steps:,} steps"
        boxes.append(Box("model", (training.run_name, f"from {_name(training.base_model_id)}", steps)))
    elif run.identity is not None:
        boxes.append(Box("model", (_name(run.identity.model.model_id), run.identity.model.dtype)))
    errors = f", {run.error_rows:,} errors" if run.error_rows else ""
    boxes.append(Box("answers", (run.run_name, _name(run.dataset_id or ""), f"{run.rows:,} rows{errors}")))
    boxes.append(Box("scores", _first_figures(summary)))
    verdict = summary.verdict
    if verdict is None:
        boxes.append(Box("verdict", ("none",)))
    else:
        against = (f"against {verdict.against_run}",)
        boxes.append(Box("verdict", (verdict.decision, *against), _TONES[verdict.decision]))
    return tuple(boxes)


def lineage_markdown(summary: EvaluationSummary, directory: Path) -> str:
    """The chain as a picture, a table of what identifies each link, and the files in `directory`."""
    run = summary.candidate
    lines = [
        f"# Lineage of {run.run_name}",
        "",
        f"![data, model, answers, scores, verdict]({data_uri(chain(lineage_boxes(summary)))})",
        "",
        "| link | what | identity |",
        "|---|---|---|",
        *(f"| {link} | {_cell(what)} | {identity} |" for link, what, identity in _links(summary)),
        "",
        "## Files",
        "",
    ]
    lines += [
        f"- {what}: `{directory.resolve() / name}`"
        for what, name in (
            ("report", "report.html"),
            ("scores of every row", "scores.jsonl"),
            ("answers", run.predictions_path),
        )
    ]
    if summary.training is not None and summary.training.losses:
        plot = data_uri(loss_plot(summary.training.losses, summary.training.best_step))
        lines += ["", "## Training", "", f"![loss by step]({plot})"]
    return "\n".join(lines)


def _links(summary: EvaluationSummary) -> list[tuple[str, str, str]]:
    links = []
    training = summary.training
    if training is not None:
        links += [
            ("training data", f"{training.training_data_id}, {training.training_row_count:,} rows", ""),
            ("base model", training.base_model_id, ""),
        ]
    run = summary.candidate
    identity = run.identity
    if identity is not None:
        model = identity.model
        adapter = f", adapter `{model.adapter_sha256[:8]}`" if model.adapter_sha256 else ""
        links.append(("model", model.model_id, f"weights `{model.weights_sha256[:8]}`{adapter}"))
        links.append(
            ("test data", f"{run.dataset_id}, {run.rows:,} rows", f"rows `{identity.rows_sha256[:12]}`")
        )
    links.append(_answers("answers", run))
    links += [_answers(f"{part}'s answers", other) for part, _, other, _ in summary.opponents]
    names = ", ".join(label(metric.name) for metric in run.metrics)
    links.append(("scores", names, f"seed {summary.settings.seed}, {summary.evaluated_at[:16]} UTC"))
    verdict = summary.verdict
    if verdict is not None:
        links.append(
            (
                "verdict",
                f"{verdict.decision}, by {label(verdict.primary_metric)}",
                f"against {verdict.against_run}",
            )
        )
    return links


def _answers(who: str, run: RunSummary) -> tuple[str, str, str]:
    machine = ", ".join(filter(None, (run.engine, run.device)))
    what = f"{run.run_name}, {run.rows:,} rows" + (f" ({machine})" if machine else "")
    return who, what, f"file `{run.predictions_sha256[:12]}`"


def _first_figures(summary: EvaluationSummary) -> tuple[str, ...]:
    metric = summary.leading_metric
    if metric.value is None:
        return (f"{label(metric.name)}: none",)
    share = is_share(metric.minimum, metric.maximum)
    lines = [f"{label(metric.name)} {shown(metric.value, share)}"]
    if metric.interval is not None:
        lines.append(f"{shown(metric.interval.low, share)} to {shown(metric.interval.high, share)}")
    before = summary.baseline.metric(metric.name) if summary.baseline else None
    if before is not None and before.value is not None:
        lines.append(f"before {shown(before.value, share)}")
    return tuple(lines)


def _name(identifier: str) -> str:
    """The last part of a path or Hub id."""
    return identifier.rstrip("/").rsplit("/", 1)[-1]


def _cell(text: str) -> str:
    """A name in a table of markdown: no column of its own, no markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
