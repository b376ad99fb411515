"""The README.md of a trained model: what it is, how it was made, how to use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.files import write_atomically
from tasks.core.models.locating import is_hub_name
from tasks.core.models.registry import read_manifest
from tasks.core.records import ModelManifest

if TYPE_CHECKING:
    from tasks.core.models.promotion import Evidence, PromotedScore, Promotion

_SCORES = re.compile(r"\n*<!-- scores -->.*<!-- end of scores -->\n*", re.DOTALL)


def model_card(manifest: ModelManifest) -> str:
    """Markdown with the front matter that the Hub reads."""
    base = manifest.base_model_id
    front = ["library_name: " + ("peft" if manifest.kind == "adapter" else "transformers")]
    if is_hub_name(base) and not Path(base).exists():
        front += [f"base_model: {base}"]
    front += ["pipeline_tag: text-generation", "tags:", "- tuneproof"]
    is_adapter = manifest.kind == "adapter"
    kind = "A LoRA adapter on" if is_adapter else "A full model fine-tuned from"
    facts = [
        ("Training data", f"`{manifest.training_data_id}`, {manifest.training_row_count} rows"),
        ("Optimizer steps", _steps(manifest)),
        ("Last training loss", _number(manifest.final_loss)),
        ("Last validation loss", _number(manifest.final_validation_loss)),
        ("Best validation loss", _best(manifest)),
    ]
    table = [f"| {name} | {value} |" for name, value in facts if value]
    lines = [
        *("---", *front, "---", ""),
        *(f"# {manifest.run_name}", "", f"{kind} `{base}`, made with tuneproof.", ""),
        *("| | |", "|---|---|", *table, ""),
        "All settings and the course of the loss are in `tuneproof_manifest.json`, the tokens that end an answer in "
        "`generation_config.json`."
        + (" Give that to `generate`: with an adapter transformers reads its base's." if is_adapter else ""),
        "",
    ]
    return "\n".join(lines)


def write_scored_card(model_dir: Path, promotion: Promotion) -> Path:
    """Put the scores of a promotion's evaluation into a model's README.md: for readers and for the Hub's tables.

    The rest of the card stays as it is. Raises StorageError.
    """
    path = model_dir / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else model_card(read_manifest(model_dir))
    if promotion.evidence is not None:
        text = scored_card(text, promotion, promotion.evidence)
    write_atomically(path, text)
    return path


def scored_card(text: str, promotion: Promotion, evidence: Evidence) -> str:
    """A card with the evaluation in its front matter (the Hub's model-index) and as a section of its own.

    Format: https://huggingface.co/docs/hub/model-cards#evaluation-results
    """
    from huggingface_hub import EvalResult, ModelCard

    dataset = evidence.dataset_id or "unknown"
    card = ModelCard(_SCORES.sub("\n", text), ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = promotion.run_name
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset if is_hub_name(dataset) else Path(dataset).stem,
            dataset_name=Path(dataset).stem,
            dataset_split=evidence.dataset_split,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=score.value,
        )
        for score in evidence.scores
        if score.value is not None
    ]
    verdict = evidence.verdict
    section = [
        *("<!-- scores -->", "## Evaluation", ""),
        f"{evidence.rows} rows of `{Path(dataset).name}`; promoted {promotion.promoted_at}.",
        "",
        f"| metric | this model | {evidence.opponent_run_name or 'compared with'} |",
        "|---|---|---|",
        *(
            f"| {score.metric} | {_interval(score)} | {_number(score.opponent_value)} |"
            for score in evidence.scores
        ),
        "",
        *(f"- {reason}" for reason in (verdict.reasons if verdict else ())),
        "<!-- end of scores -->",
    ]
    return f"{str(card).rstrip()}\n\n" + "\n".join(section) + "\n"


def _interval(score: PromotedScore) -> str:
    interval = score.interval
    return _number(score.value) + (f" [{interval.low:.4f}, {interval.high:.4f}]" if interval else "")


def _steps(manifest: ModelManifest) -> str:
    return (
        f"{manifest.steps} of {manifest.planned_steps}, stopped early"
        if manifest.stopped_early
        else str(manifest.steps)
    )


def _best(manifest: ModelManifest) -> str:
    loss = _number(manifest.best_validation_loss)
    return loss and f"{loss}, after update {manifest.best_step}: these weights"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
