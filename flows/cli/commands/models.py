"""`tuneproof models`: the fine-tuned models, and what was promoted."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.console import say, show_table, told_time
from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import prepare
from tasks.core.errors import TuneproofError
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.models.trained.registry import ModelEntry
    from tasks.core.promotion.promotion import Promotion


def models(
    config: ConfigPath = None,
    /,
    *,
    history: Annotated[bool, Parameter(negative=(), help="List promotions and rollbacks instead.")] = False,
    settings: Settings = None,
) -> None:
    """List the fine-tuned models that are there, and which one is promoted."""
    loaded = prepare(config, NO_COMMON, settings)
    (list_promotions if history else list_models)(loaded)


def list_models(config: Config) -> None:
    """Print the fine-tuned models, newest first."""
    from tasks.core.models.trained.model_store import list_models as models_in

    entries = models_in(Store(config.pipeline.models_dir))
    if not entries:
        say(f"No fine-tuned models in {config.pipeline.models_dir}; `tuneproof finetune` makes one.")
        return
    promoted = _promoted(Store(config.pipeline.models_dir))
    rows = []
    for entry in entries:
        manifest = entry.manifest
        facts = ("", "", "") if manifest is None else (
            Path(manifest.base_model_id).name, manifest.training_row_count, _number(manifest.final_loss)
        )  # fmt: skip
        rows.append((entry.run_name, *facts, told_time(entry.changed_at), _state(entry, promoted)))
    columns = ("model", "base model", "rows", "last loss", "finished", "state")
    show_table(f"Models in {config.pipeline.models_dir}", columns, rows)


def _promoted(models: Store) -> str | None:
    """Name of the promoted model; what is wrong with it is told, and hides no model."""
    from tasks.core.models.trained.champion import Champion, why_changed
    from tasks.core.promotion.promotion import current_promotion

    try:
        promotion = current_promotion(models)
        if promotion is None:
            return None
        changed = why_changed(models, Champion(promotion.run_name, promotion.weights_sha256))
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
    from tasks.core.models.trained.alias import alias_files
    from tasks.core.promotion.promotion import current_promotion, promotion_history

    models, models_dir = Store(config.pipeline.models_dir), config.pipeline.models_dir
    entries = promotion_history(models)
    if not entries:
        current_promotion(models)  # its pointer may say that there should be some
        say(f"Nothing was promoted in {models_dir}; `tuneproof promote` does it.")
        return
    rows = [
        (
            "" if entry.at is None else told_time(datetime.fromisoformat(entry.at)),
            entry.action,
            entry.promotion.run_name,
            entry.replaced,
            entry.by,
            entry.reason or _verdict_in_short(entry.promotion),
        )
        for entry in reversed(entries)
    ]
    show_table(f"Promotions in {models_dir}", ("when", "what", "model", "in place of", "by", "why"), rows)
    for path in alias_files(models).laid_aside():
        say(f"earlier ones, in a history that was damaged: {path}")
    if _promoted(models) is None:
        return
    _show_champions(config, entries[-1].promotion)


def _show_champions(config: Config, present: Promotion) -> None:
    """Print what each champion scores on the rows on which the present one was promoted."""
    from tasks.core.evaluation.opponents.champions import champion_line
    from tasks.core.evaluation.opponents.remote_runs import bring_overview
    from tasks.core.evaluation.wording import label, shown_metric
    from tasks.core.promotion.promotion import champions
    from tasks.core.runs.run_dir import RunDir

    evidence = present.evidence
    runs = Store(config.pipeline.runs_dir)
    bring_overview(runs)
    runs_dir = runs.local
    if evidence is None or evidence.verdict is None or not (runs_dir / evidence.run_name).is_dir():
        return
    rows_sha256 = RunDir(runs_dir / evidence.run_name).read_manifest().identity.rows_sha256
    metric = evidence.verdict.primary_metric
    line = champion_line(champions(Store(config.pipeline.models_dir)), runs_dir, rows_sha256, metric)
    rows = [
        (point.run_name, "not scored on these rows" if point.score is None else shown_metric(point.score))
        for point in line
    ]
    title = f"Line of champions, oldest first, on the {evidence.rows:,} rows of {evidence.run_name}"
    show_table(title, ("model", label(metric)), rows)


def _verdict_in_short(promotion: Promotion) -> str:
    verdict = promotion.evidence.verdict if promotion.evidence else None
    return "" if verdict is None else verdict.reasons[0]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
