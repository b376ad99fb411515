"""Trainings that touch the embedding or the head: what is learnt by heart is answered from the saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.config import FineTunerConfig, load_config
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.models import adapters
from tasks.core.models.loading import load_model_and_tokenizer
from tasks.core.training.identity import TrainingIdentity
from tasks.core.training.run import train
from tasks.inferencer import Inferencer
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.making.model_files import spec_of

pytestmark = pytest.mark.usefixtures("own_cache")

SUMS = [(3, 4), (5, 2), (6, 1), (8, 7), (9, 4), (2, 2), (7, 7), (5, 9), (1, 3), (4, 8), (6, 6), (9, 9)]
SETTINGS: dict[str, Any] = {
    "epochs": 30,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "device_train_batch_size": 12,
    "grad_accumulation": 1,
    "lora_dropout": 0.0,
    "lr_scheduler_type": "constant",
    "save_steps": 1000,
    "log_steps": 10,
    "max_sequence_length": 128,
    "device": "cpu",
}
ADDED = ["<|sum|>", "<|carry|>"]


def question(first: int, second: int, *, added: bool = False) -> str:
    return f"{'<|sum|>' if added else ''}{first} + {second}"


def answer(first: int, second: int, *, added: bool = False) -> str:
    carry = "<|carry|>" if added and first + second > 9 else ""
    return f"{carry}{first + second}"


def base_of(directory: Path, *, tied: bool, added: bool, resized: bool = True) -> Path:
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(tokenizer, tie_word_embeddings=tied, initializer_range=0.1)
    if added:
        tokenizer.add_tokens(ADDED, special_tokens=False)
        if resized:
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def learn(base_dir: Path, root: Path, *, added: bool = False, **changes: Any) -> Path:
    rows = [{"question": question(*pair, added=added), "answer": answer(*pair, added=added)} for pair in SUMS]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = FineTunerConfig(
        **{
            **SETTINGS,
            "base_model_id": str(base_dir),
            "training_data_id": str(root / "sums.jsonl"),
            "target_modules": ("q_proj", "v_proj", "up_proj", "down_proj"),
            **changes,
        }
    )
    return train(config, models_dir=root / "models", run_name="sums").model_dir


def right_answers(model_dir: Path, root: Path, *, added: bool = False) -> int:
    overrides = {
        "inferencer.model": str(model_dir),
        "inferencer.testing_data_id": str(root / "sums.jsonl"),
        "inferencer.max_new_tokens": 8,
        "inferencer.temperature": 0,
        "inferencer.device": "cpu",
        "pipeline.runs_dir": str(root / "runs"),
        "pipeline.models_dir": str(root / "models"),
    }
    predictions = Inferencer(load_config(None, overrides)).run()
    assert len(predictions) == len(SUMS)
    return sum(prediction.predicted_answer == prediction.ground_truth for prediction in predictions)


@pytest.fixture
def logits_in_memory(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of each trained model before it is written, of the ids 5 to 24."""
    from tasks.core.training import fitting

    seen: list[torch.Tensor] = []
    really_fit = fitting.fit

    def fit(*arguments: Any) -> Any:
        fitted = really_fit(*arguments)
        with torch.no_grad():
            seen.append(fitted.model.eval()(torch.arange(5, 25)[None]).logits)
        return fitted

    monkeypatch.setattr(fitting, "fit", fit)
    return seen


BOTH_ENDS = {"modules_to_save": ("embed_tokens", "lm_head")}
TRAININGS: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    "LoRA on a tied head": (True, False, {"target_modules": ("q_proj", "up_proj", "lm_head")}),
    "LoRA on both tied ends": (True, False, {"target_modules": ("q_proj", "up_proj", "embed_tokens", "lm_head")}),
    "a tied head saved": (True, False, {"modules_to_save": ("lm_head",)}),
    "all weights, tied": (True, False, {"full_finetuning": True, "learning_rate": 3e-3}),
    "added tokens, ends saved": (False, True, BOTH_ENDS),
    "added tokens, tied ends saved": (True, True, BOTH_ENDS),
    "added tokens, LoRA on ends": (False, True, {"target_modules": ("q_proj", "up_proj", "embed_tokens", "lm_head")}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAININGS)
def test_twelve_sums_learnt_by_heart_are_answered_by_the_saved_model(
    kind: str, tmp_path: Path, logits_in_memory: list[torch.Tensor]
) -> None:
    tied, added, changes = TRAININGS[kind]
    model_dir = learn(base_of(tmp_path / "base", tied=tied, added=added), tmp_path, added=added, **changes)
    loaded = load_model_and_tokenizer(spec_of(model_dir))
    (before,) = logits_in_memory
    assert torch.allclose(loaded.model(torch.arange(5, 25)[None]).logits, before, atol=1e-3)
    assert right_answers(model_dir, tmp_path, added=added) == len(SUMS)


def test_a_training_makes_room_for_tokens_that_only_the_tokenizer_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_dir = base_of(tmp_path / "base", tied=False, added=True, resized=False)
    model_dir = learn(base_dir, tmp_path, added=True, **BOTH_ENDS)
    assert "are new to" not in caplog.text
    assert right_answers(model_dir, tmp_path, added=True) == len(SUMS)


def test_new_tokens_that_nothing_learns_are_told_before_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_dir = base_of(tmp_path / "base", tied=False, added=True, resized=False)
    learn(base_dir, tmp_path, added=True, epochs=1)
    assert "2 tokens are new to" in caplog.text
    assert "fine_tuner.modules_to_save" in caplog.text


def test_a_tied_end_that_learns_apart_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learn(
        base_of(tmp_path / "base", tied=True, added=False),
        tmp_path,
        epochs=1,
        target_modules=("q_proj", "lm_head"),
    )
    assert "are one matrix; the head learns apart from it and is saved in the adapter" in caplog.text


def test_an_adapter_trained_on_one_with_a_tied_head_is_published_with_both_matrices(
    tmp_path: Path, logits_in_memory: list[torch.Tensor]
) -> None:
    base_dir = base_of(tmp_path / "base", tied=True, added=False)
    tied_head: dict[str, Any] = {"target_modules": ("q_proj", "up_proj", "lm_head")}
    lower = learn(base_dir, tmp_path, **tied_head, epochs=5)
    (tmp_path / "second").mkdir()
    upper = learn(lower, tmp_path / "second", **tied_head)
    assert json.loads((upper / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = load_model_and_tokenizer(spec_of(upper))
    assert torch.allclose(loaded.model(torch.arange(5, 25)[None]).logits, logits_in_memory[1], atol=1e-3)
    assert right_answers(upper, tmp_path / "second") == len(SUMS)


def test_a_merge_that_would_change_answers_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_dir = base_of(tmp_path / "base", tied=True, added=False)
    tied_head: dict[str, Any] = {"target_modules": ("q_proj", "lm_head"), "epochs": 2}
    lower = learn(base_dir, tmp_path, **tied_head)
    (tmp_path / "second").mkdir()
    really_merged = adapters.merge
    monkeypatch.setattr(
        "tasks.core.training.weights.merge",
        lambda model: (really_merged(model)[0], adapters.Merging(0.4, 1e-5)),
    )
    with pytest.raises(TrainingError, match=r"logits would differ by 40\.0%"):
        learn(lower, tmp_path / "second", **tied_head)


def test_a_module_that_the_model_does_not_have_is_named_with_those_there_are(tmp_path: Path) -> None:
    base_dir = base_of(tmp_path / "base", tied=False, added=False)
    with pytest.raises(ConfigError, match=r"(?s)modules_to_save names 'wte'.*embed_tokens") as caught:
        learn(base_dir, tmp_path, modules_to_save=("wte",))
    assert "lm_head" in str(caught.value)


def test_a_layer_cannot_learn_in_full_and_through_the_adapter() -> None:
    with pytest.raises(ValueError, match="both name lm_head"):
        FineTunerConfig(target_modules=("lm_head",), modules_to_save=("lm_head",))


def test_modules_to_save_are_part_of_a_trainings_identity_only_where_they_are_set() -> None:
    from types import SimpleNamespace

    rows = SimpleNamespace(sha256="0", earlier_count=0)
    template: Any = SimpleNamespace(writes_more=False, end=None)
    data: Any = SimpleNamespace(chat_template_sha256="0", train=rows, validation=None, template=template)
    base: Any = SimpleNamespace(weights_sha256="0", adapter_sha256=None, quantization="none")
    without, with_head = (
        TrainingIdentity.of(FineTunerConfig(modules_to_save=names), base, data, "float32").settings
        for names in ((), ("lm_head",))
    )
    assert "modules_to_save" not in without
    assert with_head["modules_to_save"] == ["lm_head"]
