"""`tuneproof finetune`: training rows to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.cli.console import say
from flows.cli.options import NO_COMMON, Common, ConfigPath, Settings
from flows.cli.starting import flow, follows, may_begin, prepare

if TYPE_CHECKING:
    from tasks.core.training.run import TrainedModel


def finetune(config: ConfigPath = None, /, *, common: Common = NO_COMMON, settings: Settings = None) -> None:
    """Fine-tune the base model on the training data."""
    loaded = prepare(config, common, settings)
    if follows(loaded, common):
        return None
    if not may_begin(loaded, common, "fine-tuning"):
        return None
    trained = flow("flows.finetuning", "finetune", loads_models=True)(loaded)
    return show_model(trained)


def show_model(trained: TrainedModel) -> None:
    """Tell where the model is and how its training went."""
    from tasks.core.report.html_page import duration
    from tasks.finetuner import best_text

    manifest = trained.manifest
    loss = "" if manifest.final_loss is None else f", last loss {manifest.final_loss:.3f}"
    told = f"{loss}{best_text(manifest)}"
    say(f"model: {trained.model_dir} ({manifest.steps} updates in {duration(manifest.seconds)}{told})")
