"""DoRA, PiSSA, NEFTune and the norm of gradients; and which settings make another training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.config import FineTunerConfig
from tasks.core.errors import ConfigError
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
from tasks.core.training.identity import TrainingIdentity
from tasks.core.training.methods.sft import read_training_data
from tasks.core.training.run import TrainedModel, train
from tests.training.test_training import own_loss

PEAK = 0.01


def run(tiny_model_dir: Path, folder: Path, run_name: str = "run", **changes: Any) -> TrainedModel:
    """Three epochs of sixteen sums, the validation loss on them after each."""
    path = folder / "rows.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(path),
        "validation_data_id": str(path),
        "device_train_batch_size": 4,
        "grad_accumulation": 1,
        "learning_rate": PEAK,
        "log_steps": 1,
        "device": "cpu",
        **changes,
    }
    return train(FineTunerConfig(**settings), models_dir=folder / "models", run_name=run_name)


def loss_of(trained: TrainedModel) -> float:
    """The loss of the published model on its validation rows, loaded as inference loads it."""
    settings = {name: trained.manifest.settings[name] for name in ("training_data_id", "validation_data_id")}
    loaded = load_model_and_tokenizer(ModelSpec(str(trained.model_dir), device="cpu"))
    validation = read_training_data(FineTunerConfig(**settings), loaded.tokenizer).validation
    assert validation is not None
    with torch.no_grad():
        return float(own_loss(loaded.model, validation.rows))


def adapter_settings(trained: TrainedModel) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((trained.model_dir / "adapter_config.json").read_text())
    return settings


# ---------------------------------------------------------------- kinds of adapter


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_rslora": True, "rank": 4},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ("q_proj", "down_proj")},
    ],
    ids=str,
)
def test_the_published_adapter_answers_as_it_was_trained(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    trained = run(tiny_model_dir, tmp_path, **changes)
    first = trained.manifest.losses[0].validation_loss
    assert trained.manifest.kind == "adapter"
    assert trained.manifest.best_validation_loss is not None and first is not None
    assert trained.manifest.best_validation_loss < 0.8 * first
    assert loss_of(trained) == pytest.approx(trained.manifest.best_validation_loss, rel=1e-3)


def test_a_pissa_adapter_is_published_as_a_plain_one_of_twice_the_rank(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = adapter_settings(
        run(tiny_model_dir, tmp_path, init_lora_weights="pissa", rank=4, lora_alpha=8)
    )
    assert (settings["init_lora_weights"], settings["r"], settings["lora_alpha"]) == (True, 8, 16)


def test_pissa_begins_where_the_base_is_and_goes_on_exactly_after_a_crash(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.core.training.trainer import AnswerTrainer

    changes: dict[str, Any] = {"init_lora_weights": "pissa", "save_steps": 3}
    undisturbed = run(tiny_model_dir, tmp_path, "undisturbed", **changes)
    plain = run(tiny_model_dir, tmp_path, "plain", epochs=0.5)
    untrained = [result.manifest.losses[0].validation_loss for result in (undisturbed, plain)]
    assert untrained[0] == pytest.approx(untrained[1], rel=1e-4)
    step = AnswerTrainer.training_step

    def failing(self: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "training_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model_dir, tmp_path, **changes)
    resumed = run(tiny_model_dir, tmp_path, **changes)
    name = "adapter_model.safetensors"
    expected, found = (load_file(result.model_dir / name) for result in (undisturbed, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[part]) for part, tensor in expected.items())


def test_pissa_on_an_adapter_gives_a_full_model_that_answers_as_trained(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = run(tiny_model_dir, tmp_path, "base", epochs=1)
    trained = run(base.model_dir, tmp_path, init_lora_weights="pissa")
    assert trained.manifest.kind == "full"
    assert loss_of(trained) == pytest.approx(trained.manifest.best_validation_loss, rel=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        {"load_in_4bit": True},
        {"use_dora": True},
        {"loftq_config": {"loftq_bits": 4}},
        {"bias": "all"},
        {"modules_to_save": ("lm_head",)},
    ],
)
def test_pissa_does_not_go_with_what_it_cannot_start_from(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pissa"):
        FineTunerConfig(init_lora_weights="pissa", **other)


def test_pissa_on_embeddings_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embed_tokens"):
        run(tiny_model_dir, tmp_path, init_lora_weights="pissa", target_modules=("q_proj", "embed_tokens"))


# ---------------------------------------------------------------- gradients and noise


@pytest.mark.parametrize(("norm", "shortened"), [(1e-6, True), (0.0, False), (1e6, False)])
def test_the_norm_of_gradients_is_limited_as_set(
    tiny_model_dir: Path, tmp_path: Path, norm: float, shortened: bool
) -> None:
    """With plain gradient descent an update moves the weights by rate times gradient."""
    changes: dict[str, Any] = {"max_grad_norm": norm, "optimizer": "sgd", "weight_decay": 0.0, "epochs": 0.25}
    moved = load_file(run(tiny_model_dir, tmp_path, **changes).model_dir / "adapter_model.safetensors")
    length = math.sqrt(sum(float(part.pow(2).sum()) for name, part in moved.items() if "lora_B" in name))
    assert (length <= PEAK * 1e-6 * 1.01) is shortened


def test_neftune_makes_noise_in_training_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    plain, noisy = (
        run(tiny_model_dir, tmp_path, name, epochs=0.5, neftune_noise_alpha=alpha).manifest.losses
        for name, alpha in (("plain", None), ("noisy", 20.0))
    )
    assert plain[1].loss != noisy[1].loss
    assert plain[0].validation_loss == noisy[0].validation_loss


# ---------------------------------------------------------------- identity


def identity_of(**settings: Any) -> dict[str, Any]:
    rows = SimpleNamespace(sha256="0" * 64, earlier_count=0)
    template: Any = SimpleNamespace(writes_more=False, end=None)
    data: Any = SimpleNamespace(train=rows, validation=None, template=template, chat_template_sha256="1" * 64)
    base: Any = SimpleNamespace(weights_sha256="2" * 64, adapter_sha256=None, quantization="none")
    return TrainingIdentity.of(FineTunerConfig(**settings), base, data, "float32").settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("warmup_ratio", 0.1),
        ("max_grad_norm", 0.3),
        ("neftune_noise_alpha", 5.0),
    ],
)
def test_a_later_setting_makes_another_training_only_where_it_is_set(name: str, value: Any) -> None:
    assert name not in identity_of()
    assert identity_of(**{name: value}) == {**identity_of(), name: value}


def test_kinds_of_adapter_do_not_matter_to_a_full_training() -> None:
    full = identity_of(full_finetuning=True)
    assert identity_of(full_finetuning=True, use_dora=True, rank=3) == full
