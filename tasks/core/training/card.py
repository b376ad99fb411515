"""The README.md of a trained model: what it is, how it was made, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.models.locating import is_hub_name
from tasks.core.records import ModelManifest

if TYPE_CHECKING:
    pass


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
        ("Last training loss", number(manifest.final_loss)),
        ("Last validation loss", number(manifest.final_validation_loss)),
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


def _steps(manifest: ModelManifest) -> str:
    return (
        f"{manifest.steps} of {manifest.planned_steps}, stopped early"
        if manifest.stopped_early
        else str(manifest.steps)
    )


def _best(manifest: ModelManifest) -> str:
    loss = number(manifest.best_validation_loss)
    return loss and f"{loss}, after update {manifest.best_step}: these weights"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
