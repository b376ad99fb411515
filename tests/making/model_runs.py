"""Directories as fine-tuning leaves them: small real adapters with a manifest, whole or unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tasks.core.models.trained.registry import write_manifest
from tasks.core.records import LossPoint, ModelManifest


def manifest_of(
    run_name: str, *, finished_at: str = "2026-01-01T00:00:00+00:00", **changes: Any
) -> ModelManifest:
    """A whole manifest of an invented training."""
    fields: dict[str, Any] = {
        "kind": "adapter",
        "base_model_id": "anna/base",
        "base_weights_sha256": "0" * 64,
        "chat_template_sha256": "1" * 64,
        "training_data_id": "train.jsonl",
        "training_rows_sha256": "2" * 64,
        "training_row_count": 300,
        "settings": {"rank": 16},
        "losses": (LossPoint(step=1, epoch=0.1, loss=2.0),),
        "final_loss": 0.5,
        "steps": 40,
        "trained_tokens": 12_000,
        "seconds": 61.5,
        "started_at": "2026-01-01T00:00:00+00:00",
        "device": "cpu",
        "tuneproof_version": "0.1.0",
        **changes,
    }
    return ModelManifest(run_name=run_name, finished_at=finished_at, **fields)


def make_run(
    models_dir: Path,
    run_name: str,
    *,
    base: Path | str,
    finished_at: str | None = "2026-01-01T00:00:00+00:00",
) -> Path:
    """An adapter on `base`; `finished_at=None` leaves it as a training that still goes on."""
    directory = models_dir / run_name
    directory.mkdir(parents=True)
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 4}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    if finished_at is None:
        (directory / "checkpoint-20").mkdir()
        return directory
    save_file({"lora": np.zeros((4, 4), np.float32)}, directory / "adapter_model.safetensors")
    write_manifest(directory, manifest_of(run_name, finished_at=finished_at))
    return directory
