"""Prefect events that tell the world what is ready; triggers in prefect.yaml start the next deployment."""

from __future__ import annotations

from pathlib import Path

from prefect.events import emit_event

from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.promotion.promotion import Promotion
from tasks.core.records import ModelManifest, RunManifest
from tasks.server.telling import is_phase

MODEL_TRAINED = "tuneproof.model.trained"
PREDICTIONS_READY = "tuneproof.predictions.ready"
EVALUATION_FINISHED = "tuneproof.evaluation.finished"
MODEL_PROMOTED = "tuneproof.model.promoted"


def emit_model_trained(model_dir: Path | str, manifest: ModelManifest) -> None:
    """Tell that a fine-tuned model is complete."""
    payload = {
        "run_name": manifest.run_name,
        "model_dir": _address(model_dir),
        "base_model_id": manifest.base_model_id,
        "training_data_id": manifest.training_data_id,
    }
    emit_event(MODEL_TRAINED, resource=_resource("model", manifest.run_name), payload=payload)


def emit_predictions_ready(run_dir: Path | str, manifest: RunManifest) -> None:
    """Tell that all rows of a run are answered and published."""
    payload = {
        "run_name": manifest.run_name,
        "run_dir": _address(run_dir),
        "run_key": manifest.run_key,
        "model_id": manifest.identity.model.model_id,
        "dataset_id": manifest.dataset_id,
    }
    emit_event(PREDICTIONS_READY, resource=_resource("run", manifest.run_name), payload=payload)


def emit_evaluation_finished(folder: Path | str, summary: EvaluationSummary) -> None:
    """Tell that a run is scored; `answer` is the finding in one sentence, `verdict` the gate's decision if any."""
    candidate = summary.candidate
    payload: dict[str, str] = {
        "run_name": candidate.run_name,
        "run_dir": _address(folder),
        "run_key": candidate.run_key or "",
        "answer": summary.answer,
    }
    resource = _resource("evaluation", candidate.run_name)
    if summary.verdict is not None:
        payload["verdict"] = summary.verdict.decision
        resource["tuneproof.verdict"] = summary.verdict.decision  # automations match labels, not the payload
    emit_event(EVALUATION_FINISHED, resource=resource, payload=payload)


def _address(place: Path | str) -> str:
    """Return what the next deployment is told: a URL as it is, a path so that it holds in any folder."""
    return place if isinstance(place, str) else str(place.resolve())


def emit_model_promoted(model_dir: str, promotion: Promotion) -> None:
    """Tell that a model, at an absolute path or URL, is the promoted one from now on, also after a rollback."""
    evidence = promotion.evidence
    payload = {
        "run_name": promotion.run_name,
        "model_dir": model_dir,
        "promoted_by": promotion.promoted_by or "",
        "reason": promotion.reason or "",
        "evaluated_run": "" if evidence is None else evidence.run_name,
    }
    emit_event(MODEL_PROMOTED, resource=_resource("model", promotion.run_name), payload=payload)


def _resource(kind: str, run_name: str) -> dict[str, str]:
    """Name the resource; phases of a pipeline run get names of their own.

    The pipeline itself does what comes next, so the triggers, which listen to `tuneproof.<kind>.*`, must not. A
    pipeline that stops early emits its last phase's event again at its end, not being a phase itself.
    """
    scope = "tuneproof.pipeline" if is_phase() else "tuneproof"
    return {"prefect.resource.id": f"{scope}.{kind}.{run_name}", "prefect.resource.name": run_name}
