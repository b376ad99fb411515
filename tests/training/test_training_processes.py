"""A training that several processes share: the same losses and weights, whatever becomes of one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tasks.core.config import FineTunerConfig
from tasks.core.training.run import TrainedModel, train
from tests.making.warm.children import warm_children  # noqa: F401

pytestmark = pytest.mark.usefixtures("warm_children")


def write_rows(path: Path, count: int, *, first: int = 0) -> Path:
    """Questions of quite different lengths with short answers."""
    rows = [
        {"question": f"Anna has {i} apples" + " and some books" * (i % 7) + ".", "answer": f"She has {i + 1} apples."}
        for i in range(first, first + count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Updates of six rows in pieces of two; 23 rows, so that the last update of an epoch has five."""
    return {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(write_rows(tmp_path / "train.jsonl", 23)),
        "validation_data_id": str(write_rows(tmp_path / "validation.jsonl", 7, first=100)),
        "epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "device_train_batch_size": 2,
        "device_validation_batch_size": 2,
        "grad_accumulation": 3,
        "lora_dropout": 0.0,
        "save_steps": 3,
        "log_steps": 1,
        "device": "cpu",
    }


def run(settings: dict[str, Any], models_dir: Path, name: str = "run", **changes: Any) -> TrainedModel:
    return train(FineTunerConfig(**{**settings, **changes}), models_dir=models_dir, run_name=name)


def difference(one: TrainedModel, other: TrainedModel) -> float:
    """The largest difference between losses, and between weights, of two trainings."""
    losses = [
        [(point.step, point.loss, point.validation_loss) for point in trained.manifest.losses]
        for trained in (one, other)
    ]
    assert [(step, loss is None) for step, loss, _ in losses[0]] == [
        (s, loss is None) for s, loss, _ in losses[1]
    ]
    found = [
        abs(mine - theirs)
        for a, b in zip(*losses, strict=True)
        for mine, theirs in zip(a[1:], b[1:], strict=True)
        if mine is not None and theirs is not None
    ]
    (name,) = {path.name for path in one.model_dir.glob("*.safetensors")}
    mine, theirs = (load_file(trained.model_dir / name) for trained in (one, other))
    assert mine.keys() == theirs.keys()
    found += [float((mine[key].float() - theirs[key].float()).abs().max()) for key in mine]
    return max(found)


@pytest.mark.parametrize("changes", [{}], ids=["LoRA"])
def test_two_processes_learn_what_one_learns(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    alone = run(settings, tmp_path / "alone", **changes)
    for processes in (2, 4):
        shared = run(settings, tmp_path / f"shared-{processes}", processes=processes, **changes)
        assert (shared.manifest.processes, shared.manifest.strategy) == (processes, "ddp")
        assert difference(alone, shared) < 1e-5
        assert shared.manifest.trained_tokens == alone.manifest.trained_tokens
