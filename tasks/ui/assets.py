"""Models, answers and scores as Prefect assets: lineage on Prefect Cloud, plain events on a server of one's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.assets import Asset, AssetProperties, materialize
from prefect.cache_policies import NO_CACHE

from tasks.core.errors import first_line
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.records import ModelManifest, RunManifest

logger = logging.getLogger(__name__)

_MADE_BY = "tuneproof"


def record_model(model_dir: Path, manifest: ModelManifest) -> None:
    """Tell that a model was made, of which base model and training data."""
    _record(
        _asset("models", manifest.run_name, f"{manifest.kind} of {manifest.base_model_id}"),
        (_asset("data", manifest.training_data_id), _asset("models", manifest.base_model_id)),
        {
            "path": str(model_dir.resolve()),
            "rows": manifest.training_row_count,
            "steps": manifest.steps,
            "final_loss": manifest.final_loss,
            "final_validation_loss": manifest.final_validation_loss,
            "best_step": manifest.best_step,
            "best_validation_loss": manifest.best_validation_loss,
            "seconds": round(manifest.seconds, 1),
        },
    )


def record_predictions(run_dir: Path, manifest: RunManifest) -> None:
    """Tell that answers are there, of which model to which questions."""
    model_id = manifest.identity.model.model_id
    _record(
        _asset("answers", manifest.run_name, f"answers of {model_id} to {manifest.dataset_id}"),
        (_asset("models", model_id), _asset("data", manifest.dataset_id)),
        {
            "path": str(run_dir.resolve()),
            "run_key": manifest.run_key,
            "rows": manifest.row_count,
            "errors": manifest.error_count,
            "completion_tokens": manifest.completion_tokens,
            "seconds": round(manifest.generation_seconds, 1),
        },
    )


def record_scores(directory: Path, summary: EvaluationSummary) -> None:
    """Tell that answers were scored, against whose, and with which verdict."""
    runs = [summary.candidate, *(run for _, _, run, _ in summary.opponents)]
    figures: dict[str, Any] = {metric.name: metric.value for metric in summary.candidate.metrics}
    verdict = None if summary.verdict is None else summary.verdict.decision
    _record(
        _asset("scores", summary.candidate.run_name, summary.answer),
        [_asset("answers", run.run_name) for run in runs],
        {"path": str(directory.resolve()), "answer": summary.answer, "verdict": verdict, **figures},
    )


def _asset(kind: str, name: str, description: str | None = None) -> Asset:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    key = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-") or "unnamed"
    if description is None:
        return Asset(key=f"tuneproof://{kind}/{key}")
    return Asset(
        key=f"tuneproof://{kind}/{key}", properties=AssetProperties(name=name, description=description[:2000])
    )


def _record(asset: Asset, made_of: Sequence[Asset], metadata: dict[str, Any]) -> None:
    """Materialize an asset that exists already; a run never fails because of it."""

    @materialize(
        asset,
        asset_deps=list(dict.fromkeys(made_of)),
        by=_MADE_BY,
        name="record-asset",
        task_run_name=asset.key.removeprefix("tuneproof://"),
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def record() -> None:
        asset.add_metadata(metadata)

    try:
        record()
    except Exception as error:  # whatever the server or its client says: the work that it tells of is done
        logger.warning("an asset could not be recorded: %s", first_line(error))
