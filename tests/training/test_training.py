"""Training: the loss, the order of rows, packing, resuming after a crash, memory, and what is published."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from tasks.core.config import FineTunerConfig
from tasks.core.errors import (
    ConfigError,
    DataError,
    ModelLoadError,
    OutOfMemoryError,
    RunKeyMismatchError,
    RunLockedError,
    StorageError,
    TrainingError,
)
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
from tasks.core.models.trained import registry
from tasks.core.training import checkpoints, fitting
from tasks.core.training.adapting import choose_attention
from tasks.core.training.job import BatchPlan
from tasks.core.training.methods.answer_loss import AnswerHead, summed_loss
from tasks.core.training.methods.batches import Collator, LengthGroupedOrder
from tasks.core.training.methods.packing import check_packing, pack
from tasks.core.training.methods.rows import TokenizedRows
from tasks.core.training.run import TrainedModel, TrainingProgress, train
from tasks.core.training.session import loss_points
from tasks.core.training.weights import save_weights
from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED_WEIGHTS = "adapter_model.safetensors"

# ---------------------------------------------------------------- fixtures


def write_rows(path: Path, count: int, *, first: int = 0) -> Path:
    """Questions of quite different lengths with short answers."""
    rows = [
        {
            "question": f"Anna has {i} apples" + " and some books" * (i % 7) + ".",
            "answer": f"She has {i + 1} apples.",
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 40)


@pytest.fixture(scope="module")
def validation_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "validation.jsonl", 13, first=100)


def base_settings(tiny_model_dir: Path, rows_path: Path) -> dict[str, Any]:
    """Ten steps of eight rows, a checkpoint at steps 3, 6, 9 and 10."""
    return {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(rows_path),
        "epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "device_train_batch_size": 4,
        "grad_accumulation": 2,
        "save_steps": 3,
        "log_steps": 1,
        "device": "cpu",
    }


@pytest.fixture
def settings(tiny_model_dir: Path, rows_path: Path) -> dict[str, Any]:
    return base_settings(tiny_model_dir, rows_path)


def run(
    settings: dict[str, Any], models_dir: Path, run_name: str | None = "run", **changes: Any
) -> TrainedModel:
    return train(FineTunerConfig(**{**settings, **changes}), models_dir=models_dir, run_name=run_name)


def weights(trained: TrainedModel | Path) -> dict[str, torch.Tensor]:
    directory = trained if isinstance(trained, Path) else trained.model_dir
    return load_file(directory / PUBLISHED_WEIGHTS)


def assert_same_weights(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=tolerance), name


# ---------------------------------------------------------------- the loss

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_of(kind: str) -> Any:
    import transformers

    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**SMALL, **HEADS),
        "qwen2, tied": lambda: transformers.Qwen2Config(**SMALL, **HEADS, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "gemma2, soft-capped": lambda: transformers.Gemma2Config(
            **SMALL, **HEADS, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager"
        ),
        "cohere, scaled": lambda: transformers.CohereConfig(**SMALL, **HEADS, logit_scale=0.25),
        "granite, scaled": lambda: transformers.GraniteConfig(**SMALL, **HEADS, logits_scaling=7.0),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]())


KINDS = ("llama", "qwen2, tied", "gpt2", "gemma2, soft-capped", "cohere, scaled", "granite, scaled")


def random_rows(count: int = 6, vocabulary: int = 97) -> TokenizedRows:
    random = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        ids = torch.randint(0, vocabulary, (9 + 5 * index,), generator=random).tolist()
        rows.append((ids, [-100] * (4 + index) + ids[4 + index :]))
    return TokenizedRows(rows)


def own_loss(model: Any, rows: TokenizedRows) -> torch.Tensor:
    """The model's own loss, row by row without padding, weighted by the tokens learnt."""
    total, count = torch.zeros(()), 0
    for ids, labels in (rows[index] for index in range(len(rows))):
        learnt = int((labels[1:] != -100).sum())
        batch = {
            "input_ids": torch.tensor(ids[None].astype("int64")),
            "labels": torch.tensor(labels[None].astype("int64")),
        }
        total = total + model(**batch, use_cache=False).loss * learnt
        count += learnt
    return total / count


def answer_loss(model: Any, rows: TokenizedRows, sequences: list[list[int]] | None = None) -> torch.Tensor:
    count = len(rows if sequences is None else sequences)
    batch = Collator(rows, sequences, pad_token_id=0)(range(count))
    logits = AnswerHead(model).logits_at(
        model, batch["input_ids"], batch["positions"], batch.get("position_ids")
    )
    return summed_loss(logits, batch["targets"]) / len(batch["targets"])


def loss_ratio(result: TrainedModel) -> float:
    """The last loss as a share of the first."""
    first, last = result.manifest.losses[0].loss, result.manifest.final_loss
    assert first is not None and last is not None
    return last / first


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "LoRA"])
def test_loss_and_gradients_equal_those_of_the_models_own_forward(kind: str, adapted: bool) -> None:
    model = tiny_of(kind)
    if adapted:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    rows = random_rows()
    expected, mine = own_loss(model, rows), answer_loss(model, rows)
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradients = gradients(model, expected)
    for name, gradient in gradients(model, mine).items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6), name


def test_the_head_sees_only_the_positions_that_have_a_label() -> None:
    model, rows = tiny_of("llama"), random_rows()
    seen: list[tuple[int, ...]] = []
    answer_head = AnswerHead(model)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    batch = Collator(rows, None, 0)(range(len(rows)))
    answer_head.logits_at(model, batch["input_ids"], batch["positions"])
    model(input_ids=batch["input_ids"])  # anything else still gets all logits
    assert seen == [(1, rows.target_count, 32), (*batch["input_ids"].shape, 32)]


def test_a_model_that_computes_its_logits_around_its_head_gets_the_same_loss() -> None:
    class Bypassing(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    model, rows = tiny_of("llama"), random_rows()
    assert answer_loss(Bypassing(model), rows).item() == pytest.approx(
        answer_loss(model, rows).item(), rel=1e-6
    )


def test_the_first_token_of_a_row_is_never_a_target() -> None:
    rows = TokenizedRows([([5, 6, 7], [5, 6, 7])])
    assert rows[0][1].tolist() == [-100, 6, 7]


# ---------------------------------------------------------------- order and padding


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch_alone() -> None:
    lengths = [(7 * index) % 83 + 1 for index in range(101)]
    first, again = (LengthGroupedOrder(lengths, 8, seed=3) for _ in range(2))
    orders = []
    for epoch in range(2):
        first.set_epoch(epoch)
        again.set_epoch(epoch)
        assert list(first) == list(again)
        assert sorted(first) == list(range(101))
        orders.append(list(first))
    assert orders[0] != orders[1]
    assert list(LengthGroupedOrder(lengths, 8, seed=4)) != orders[0]


def test_rows_of_similar_length_stand_together_and_the_longest_batch_comes_first() -> None:
    lengths = [(7919 * index) % 500 + 1 for index in range(4000)]

    def padded(order: list[int]) -> int:
        batches = [order[at : at + 8] for at in range(0, len(order), 8)]
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    order = list(LengthGroupedOrder(lengths, 8, seed=0))
    assert padded(order) < 1.05 * sum(lengths)
    assert padded(list(range(4000))) > 1.5 * sum(lengths)
    assert max(lengths) in [lengths[row] for row in order[:8]]
    # Batches are mixed: lengths do not simply fall or rise over an epoch.
    means = [sum(lengths[row] for row in order[at : at + 8]) / 8 for at in range(0, 4000, 8)]
    falls = sum(later < earlier for earlier, later in itertools.pairwise(means))
    assert 150 < falls < 350


def test_a_batch_is_padded_to_a_multiple_of_eight_at_most() -> None:
    rows = TokenizedRows([(range(9), range(9)), (range(3), range(3))])
    batch = Collator(rows, None, pad_token_id=1)([0, 1])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["token_count"] == 12
    assert batch["input_ids"].reshape(-1)[batch["positions"] + 1].tolist() == batch["targets"].tolist()


# ---------------------------------------------------------------- packing


def test_packing_keeps_every_row_once_and_fills_sequences_well() -> None:
    lengths = [(7919 * index) % 400 + 1 for index in range(500)]
    sequences = pack(lengths, 1000)
    assert sorted(row for rows in sequences for row in rows) == list(range(500))
    totals = [sum(lengths[row] for row in rows) for rows in sequences]
    assert max(totals) <= 1000
    assert len(sequences) <= math.ceil(sum(lengths) / 1000) + 1


@pytest.mark.parametrize("kind", ["llama", "qwen2, tied", "gemma2, soft-capped", "granite, scaled"])
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(kind: str) -> None:
    model, rows = tiny_of(kind), random_rows()
    check_packing(model)
    sequences = pack(rows.lengths, 60)
    assert len(sequences) < len(rows)
    expected, mine = own_loss(model, rows), answer_loss(model, rows, sequences)
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradients = gradients(model, expected)
    for name, gradient in gradients(model, mine).items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6), name


def test_packing_is_refused_for_a_model_in_which_rows_would_see_each_other() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(TrainingError, match="packing = false"):
        check_packing(model)


def test_packed_training_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    trained = run(settings, tmp_path, packing=True, max_sequence_length=128, epochs=6)
    losses = [point.loss for point in trained.manifest.losses if point.loss is not None]
    assert trained.manifest.training_row_count == 40
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(
    tiny_model_dir: Path, rows_path: Path, validation_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainedModel, FineTunerConfig, list[TrainingProgress]]:
    """One finished LoRA training with validation data; do not write to it."""
    config = FineTunerConfig(
        base_model_id=str(tiny_model_dir),
        training_data_id=str(rows_path),
        validation_data_id=str(validation_path),
        epochs=3,
        learning_rate=1e-2,
        device_train_batch_size=4,
        grad_accumulation=2,
        save_steps=4,
        save_total_limit=2,
        log_steps=2,
        device="cpu",
    )
    seen: list[TrainingProgress] = []
    models_dir = tmp_path_factory.mktemp("models")
    return train(config, models_dir=models_dir, run_name="done", on_progress=seen.append), config, seen


def test_training_lowers_the_loss_of_training_and_validation_rows(trained: Any) -> None:
    manifest = trained[0].manifest
    validation = [point.validation_loss for point in manifest.losses if point.validation_loss is not None]
    assert manifest.losses[1].loss > 2 * manifest.final_loss
    assert validation[0] > 2 * validation[-1] == 2 * manifest.final_validation_loss


def test_validation_runs_before_training_at_each_epochs_end_and_each_checkpoint(trained: Any) -> None:
    points = trained[0].manifest.losses
    assert [point.step for point in points if point.validation_loss is not None] == [0, 4, 5, 8, 10, 12, 15]
    assert [point.step for point in points if point.loss is not None] == [1, 2, 4, 6, 8, 10, 12, 14, 15]


def test_the_finished_directory_is_a_complete_model_that_loads(trained: Any, tiny_model: Any) -> None:
    model_dir, manifest = trained[0].model_dir, trained[0].manifest
    (entry,) = registry.list_models(model_dir.parent)
    assert entry.complete and entry.manifest == manifest
    loaded = load_model_and_tokenizer(ModelSpec(str(model_dir), device="cpu"))
    ids = torch.arange(5, 25)[None]
    assert not torch.allclose(loaded.model(ids).logits, tiny_model(ids).logits, atol=1e-3)
    assert loaded.tokenizer.chat_template is not None
    assert loaded.identity.chat_template_sha256 == manifest.chat_template_sha256


def test_the_manifests_best_validation_loss_is_that_of_the_published_model(
    trained: Any, validation_path: Path
) -> None:
    from tasks.core.training.methods.sft import read_training_data

    result, config, _ = trained
    loaded = load_model_and_tokenizer(ModelSpec(str(result.model_dir), device="cpu"))
    validation = read_training_data(config, loaded.tokenizer).validation
    assert validation is not None
    with torch.no_grad():
        expected = own_loss(loaded.model, validation.rows).item()
    assert result.manifest.best_validation_loss == pytest.approx(expected, rel=1e-4)


def test_the_adapter_names_its_base_by_a_path_that_lasts(
    settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_dir.parent)
    result = run(settings, tmp_path, base_model_id=tiny_model_dir.name, epochs=0.2)
    named = json.loads((result.model_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == result.manifest.base_model_id == str(tiny_model_dir.resolve())


def test_the_manifest_tells_what_was_trained(trained: Any, tiny_model_dir: Path) -> None:
    manifest = trained[0].manifest
    assert (manifest.kind, manifest.steps, manifest.training_row_count) == ("adapter", 15, 40)
    assert manifest.base_weights_sha256 == registry.weights_sha256(tiny_model_dir)
    assert manifest.settings["rank"] == 16 and manifest.memory_events == ()
    assert manifest.trained_tokens > 3 * 40 * 10
    assert manifest.seconds > 0 and manifest.started_at <= manifest.finished_at == manifest.ordered_at


def test_progress_reaches_the_last_step_with_loss_rate_and_time_left(trained: Any) -> None:
    seen = trained[2]
    assert seen[0].step == 1 and seen[0].validation_loss is not None
    assert (seen[-1].step, seen[-1].total_steps, seen[-1].eta_seconds) == (15, 15, 0.0)
    assert all(progress.tokens_per_second > 0 and progress.loss is not None for progress in seen)


def test_checkpoints_are_rotated(trained: Any) -> None:
    found = {path.name for path in (trained[0].model_dir / "checkpoints").iterdir()}
    assert found == {"checkpoint-12", "checkpoint-15", f"checkpoint-{trained[0].manifest.best_step}"}


def test_the_same_training_twice_gives_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_same_weights(weights(run(settings, tmp_path, "a")), weights(run(settings, tmp_path, "b")))


def test_cutting_a_step_into_pieces_does_not_change_what_is_learnt(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(settings, tmp_path, "whole", device_train_batch_size=8, grad_accumulation=1, lora_dropout=0.0)
    pieces = run(
        settings, tmp_path, "pieces", device_train_batch_size=2, grad_accumulation=4, lora_dropout=0.0
    )
    assert_same_weights(weights(whole), weights(pieces), tolerance=2e-4)
    losses = [[point.loss for point in result.manifest.losses] for result in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_gradient_checkpointing_does_not_change_what_is_learnt(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = run(settings, tmp_path, "plain")
    saving = run(settings, tmp_path, "saving", use_gradient_checkpointing="unsloth")
    assert_same_weights(weights(plain), weights(saving), tolerance=1e-5)


def test_full_finetuning_keeps_float32_while_training_and_publishes_the_bases_dtype(
    settings: dict[str, Any], tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    import copy

    base_dir = tmp_path / "base-in-bfloat16"
    copy.deepcopy(tiny_model).to(torch.bfloat16).save_pretrained(base_dir)
    tiny_tokenizer.save_pretrained(base_dir)
    result = run(
        settings,
        tmp_path,
        base_model_id=str(base_dir),
        full_finetuning=True,
        learning_rate=1e-3,
        save_steps=100,
    )
    (checkpoint_dir,) = (result.model_dir / "checkpoints").iterdir()
    kept = load_file(checkpoint_dir / "model.safetensors")
    published = load_file(result.model_dir / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert result.manifest.kind == "full"
    assert loss_ratio(result) < 1
    published_config = (result.model_dir / "config.json").read_text()
    assert json.loads(published_config)["use_cache"] is True
    assert "eager" not in published_config  # an attention chosen for training on this machine stays here
    assert registry.why_incomplete(result.model_dir) is None


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [([60] * 95 + [900] * 5, "eager"), ([60] * 90 + [500] * 10, "sdpa"), ([60] * 99 + [2000], "sdpa")],
    ids=["short rows", "many long rows", "one very long row"],
)
def test_short_rows_on_a_cpu_are_trained_with_plain_attention(lengths: list[int], chosen: str) -> None:
    model = tiny_of("llama")
    assert model.config._attn_implementation == "sdpa"
    choose_attention(model, lengths)
    assert model.config._attn_implementation == chosen
    rows = random_rows()
    assert answer_loss(model, rows).item() == pytest.approx(own_loss(tiny_of("llama"), rows).item(), rel=1e-5)


@pytest.mark.processor
def test_an_adapter_of_bfloat16_weights_learns_in_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    result = run(settings, tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}
    assert loss_ratio(result) < 0.7


def test_an_adapter_whose_base_exists_nowhere_else_is_published_as_a_full_model(
    settings: dict[str, Any], trained: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"base_model_id": str(trained[0].model_dir)}
    validation = {"validation_data_id": settings["training_data_id"], "lora_dropout": 0.0}
    result = run(settings, tmp_path, **changes, **validation)
    assert result.manifest.kind == "full"
    loaded = load_model_and_tokenizer(ModelSpec(str(result.model_dir), device="cpu"))
    from tasks.core.training.methods.sft import read_training_data

    data = read_training_data(FineTunerConfig(**settings), loaded.tokenizer)
    with torch.no_grad():
        loss = own_loss(loaded.model, data.train.rows).item()
    assert loss == pytest.approx(result.manifest.best_validation_loss, rel=1e-3)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_learns_on_quantised_weights(settings: dict[str, Any], tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    result = run(
        settings, tmp_path, f"load-{bits}", **{f"load_in_{bits}": True}, use_gradient_checkpointing=True
    )
    assert loss_ratio(result) < 0.8
    loaded = load_model_and_tokenizer(
        ModelSpec(
            str(result.model_dir), device="cpu", load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit"
        )
    )
    assert loaded.identity.adapter_sha256 is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True, "bias": "all", "target_modules": ("q_proj", "v_proj"), "rank": 4},
        {"optimizer": "adafactor", "lr_scheduler_type": "cosine"},
        {"optimizer": "sgd", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_other_settings_are_honoured(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    result = run(settings, tmp_path, **changes, epochs=0.5)
    adapter = json.loads((result.model_dir / "adapter_config.json").read_text())
    assert adapter["use_rslora"] is changes.get("use_rslora", False)
    assert adapter["r"] == changes.get("rank", 16) and adapter["bias"] == changes.get("bias", "none")
    if "target_modules" in changes:
        assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    assert (
        result.manifest.settings.items()
        >= {
            name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()
        }.items()
    )


def test_the_learning_rate_follows_the_validation_loss_where_that_is_asked(
    settings: dict[str, Any], validation_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="validation_data_id"):
        run(settings, tmp_path, lr_scheduler_type="reduce_lr_on_plateau")
    result = run(
        settings, tmp_path, lr_scheduler_type="reduce_lr_on_plateau", validation_data_id=str(validation_path)
    )
    assert result.manifest.final_validation_loss is not None


# ---------------------------------------------------------------- crash and resume

CHILD = """
import json, os, signal, sys
from pathlib import Path
from tasks.core.config import FineTunerConfig
from tasks.core.training.run import train

settings, models_dir, run_name, die_at = json.loads(sys.argv[1])

def die(progress):
    if progress.step >= die_at:
        os.kill(os.getpid(), signal.SIGKILL)

import tasks.core.training.session as session
from functools import partial
session.TrainingMeter = partial(session.TrainingMeter, interval_seconds=0)
train(FineTunerConfig(**settings), models_dir=Path(models_dir), run_name=run_name, on_progress=die)
"""


def child(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return run_python(["-c", textwrap.dedent(code), json.dumps(arguments)], cwd=ROOT)


def killed_training(settings: dict[str, Any], models_dir: Path, run_name: str | None, die_at: int) -> None:
    process = child(CHILD, settings, str(models_dir), run_name, die_at)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.fixture(scope="module")
def resumable(
    tiny_model_dir: Path, rows_path: Path, validation_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], TrainedModel, Path]:
    """Settings, an undisturbed training, and the models directory of one killed at step 8; copy, do not use it."""
    settings = {
        **base_settings(tiny_model_dir, rows_path),
        "validation_data_id": str(validation_path),
    }
    models_dir = tmp_path_factory.mktemp("killed")
    killed_training(settings, models_dir, "killed", die_at=8)
    return settings, run(settings, tmp_path_factory.mktemp("undisturbed"), "undisturbed"), models_dir


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    resumable: Any, tmp_path: Path
) -> None:
    settings, undisturbed, killed_models_dir = resumable
    shutil.copytree(killed_models_dir, tmp_path, dirs_exist_ok=True)
    assert registry.why_incomplete(tmp_path / "killed") is not None
    resumed = run(settings, tmp_path, "killed")
    assert_same_weights(weights(undisturbed), weights(resumed))
    assert [(p.step, p.validation_loss) for p in resumed.manifest.losses] == [
        (p.step, p.validation_loss) for p in undisturbed.manifest.losses
    ]
    assert resumed.manifest.trained_tokens == undisturbed.manifest.trained_tokens


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_a_checkpoint_with_a_changed_byte_in_any_file_is_not_gone_on_from(
    resumable: Any, tmp_path: Path, name: str
) -> None:
    settings, undisturbed, killed_models_dir = resumable
    shutil.copytree(killed_models_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "killed" / "checkpoints" / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_same_weights(weights(undisturbed), weights(run(settings, tmp_path, "killed")))


@pytest.mark.parametrize("damage", ["no seal", "cut file", "missing file"])
def test_a_checkpoint_that_was_not_finished_is_ignored(
    resumable: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, undisturbed, killed_models_dir = resumable
    shutil.copytree(killed_models_dir, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "killed" / "checkpoints" / "checkpoint-6"
    optimizer_path = newest / "optimizer.pt"
    if damage == "no seal":
        (newest / "complete.json").unlink()
    elif damage == "cut file":
        optimizer_path.write_bytes(optimizer_path.read_bytes()[:100])
    else:
        optimizer_path.unlink()
    caplog.set_level("INFO")
    resumed = run(settings, tmp_path, "killed")
    assert "checkpoint-6 is incomplete" in caplog.text
    assert "checkpoint-5 (step 5 of 10)" in caplog.text
    assert_same_weights(weights(undisturbed), weights(resumed))


def test_resume_false_starts_again(resumable: Any, tmp_path: Path) -> None:
    settings, _, killed_models_dir = resumable
    shutil.copytree(killed_models_dir, tmp_path, dirs_exist_ok=True)
    seen: list[TrainingProgress] = []
    config = FineTunerConfig(**{**settings, "resume": False, "rank": 8})
    result = train(config, models_dir=tmp_path, run_name="killed", on_progress=seen.append)
    assert seen[0].step == 1
    assert result.manifest.settings["rank"] == 8


def test_an_unfinished_run_refuses_other_settings(resumable: Any, tmp_path: Path) -> None:
    settings, _, killed_models_dir = resumable
    shutil.copytree(killed_models_dir, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RunKeyMismatchError, match="rank: 16 -> 8"):
        run(settings, tmp_path, "killed", rank=8)


def test_a_crash_while_publishing_repeats_no_step(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(settings, tmp_path, "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path, "cut")
    assert not registry.list_models(tmp_path)[-1].complete or not registry.list_models(tmp_path)[0].complete
    seen: list[TrainingProgress] = []
    finished = train(
        FineTunerConfig(**settings), models_dir=tmp_path, run_name="cut", on_progress=seen.append
    )
    assert seen == []
    assert_same_weights(weights(undisturbed), weights(finished))
    assert finished.manifest.losses == undisturbed.manifest.losses


def test_unnamed_trainings_that_begin_in_the_same_second_have_names_of_their_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    moment = datetime(2026, 1, 1, 23, 59, 59)
    for rank in (2, 4):
        config = FineTunerConfig(**{**settings, "rank": rank, "epochs": 1})
        train(config, models_dir=tmp_path, started_at=moment)
    assert sorted(path.name[-15:] for path in tmp_path.glob("*-2026*")) == [
        "20260101-235959",
        "20260102-000000",
    ]


def test_an_unnamed_training_that_was_killed_is_finished_by_the_same_command(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["run_name_prefix"] = "nightly-"
    killed_training(settings, tmp_path, None, die_at=5)
    (begun,) = tmp_path.iterdir()
    assert begun.name.startswith("nightly-tiny-llama-")
    assert run(settings, tmp_path, None, rank=4).model_dir != begun  # another training
    assert run(settings, tmp_path, None).model_dir == begun
    assert run(settings, tmp_path, None).model_dir != begun  # that one is finished


# ---------------------------------------------------------------- one directory, one training


def test_a_finished_training_is_not_repeated(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    result, config, _ = trained
    before = (result.model_dir / PUBLISHED_WEIGHTS).stat()
    caplog.set_level("INFO")
    again = train(config, models_dir=result.model_dir.parent, run_name="done")
    assert again.reused and again.manifest == result.manifest
    assert (result.model_dir / PUBLISHED_WEIGHTS).stat() == before
    assert "used as it is" in caplog.text


def test_a_finished_training_whose_files_have_changed_is_refused_not_returned(
    trained: Any, tmp_path: Path
) -> None:
    result, config, _ = trained
    shutil.copytree(result.model_dir, tmp_path / "done")
    tokenizer_path = tmp_path / "done" / "tokenizer.json"
    tokenizer_path.write_text(tokenizer_path.read_text() + "\n")
    with pytest.raises(ModelLoadError, match="its files have changed since"):
        train(config, models_dir=tmp_path, run_name="done")


def test_batch_pieces_and_logging_do_not_make_another_training(trained: Any) -> None:
    result, config, _ = trained
    other = config.model_copy(update={"device_train_batch_size": 8, "grad_accumulation": 1, "log_steps": 7})
    assert train(other, models_dir=result.model_dir.parent, run_name="done").reused


def test_other_settings_in_the_same_directory_are_refused_and_named(trained: Any, tmp_path: Path) -> None:
    result, config, _ = trained
    rows = write_rows(tmp_path / "other.jsonl", 5)
    other = config.model_copy(update={"learning_rate": 0.5, "training_data_id": str(rows)})
    with pytest.raises(RunKeyMismatchError) as caught:
        train(other, models_dir=result.model_dir.parent, run_name="done")
    assert "learning_rate: 0.01 -> 0.5" in caught.value.what
    assert "training rows: " in caught.value.what and "rank" not in caught.value.what


def test_a_training_that_failed_before_its_first_checkpoint_does_not_keep_its_name(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="q_proj"):
        run(settings, tmp_path, target_modules=("query",))
    corrected = run(settings, tmp_path, target_modules=("q_proj",), epochs=0.5)
    assert corrected.manifest.settings["target_modules"] == ["q_proj"]


def test_a_directory_with_a_foreign_model_is_not_written_to(settings: dict[str, Any], tmp_path: Path) -> None:
    foreign = tmp_path / "run" / "model.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"precious")
    with pytest.raises(RunKeyMismatchError, match="not trained here"):
        run(settings, tmp_path)
    assert foreign.read_bytes() == b"precious"


def test_two_trainings_cannot_write_one_directory(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(RunLockedError):
        run(settings, tmp_path)


def test_a_bad_run_name_is_told_before_anything_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        run(settings, tmp_path, "../escape", training_data_id="/nowhere.jsonl")


# ---------------------------------------------------------------- bad rows, bad settings, bad luck


def test_rows_that_cannot_be_learnt_are_left_out_counted_and_explained(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 8)
    bad = [{"question": "", "answer": "x"}, {"question": "no answer", "answer": None}] * 2
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    result = run(settings, tmp_path, training_data_id=str(path))
    assert (result.manifest.training_row_count, result.manifest.skipped_row_count) == (8, 4)
    assert result.manifest.training_dataset_sha256 not in (None, result.manifest.training_rows_sha256)
    assert "4 of 12 rows" in caplog.text and "the question is empty" in caplog.text
    assert caplog.text.count("\n    row ") == 3


def test_rows_beyond_the_position_table_are_cut_to_it(
    settings: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tiny_tokenizer), **shape))
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = [
        {"question": f"How many apples has Anna? {i} " * (1 + 40 * (i == 3)), "answer": "4"} for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"base_model_id": str(tmp_path / "gpt2"), "training_data_id": str(tmp_path / "rows.jsonl")}
    result = run(settings, tmp_path / "models", **changes, epochs=1)
    assert (result.manifest.truncated_row_count, result.manifest.training_row_count) == (1, 4)
    assert result.manifest.settings["max_sequence_length"] == 64
    assert "the model has 64 positions" in caplog.text


def test_no_usable_row_is_an_error_with_the_reasons(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": " ", "answer": "x"}) + "\n")
    with pytest.raises(DataError, match="the question is empty"):
        run(settings, tmp_path, training_data_id=str(path))


def test_a_loss_that_is_no_number_stops_training_and_says_what_to_lower(
    settings: dict[str, Any], tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    import copy

    broken = copy.deepcopy(tiny_model)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(TrainingError, match="learning_rate") as caught:
        run(settings, tmp_path, base_model_id=str(tmp_path / "broken"))
    assert "nan at step 1" in caught.value.what
    assert registry.why_incomplete(tmp_path / "run") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_loftq_without_a_gpu_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        run(settings, tmp_path, loftq_config={"loftq_bits": 4})


def test_unknown_target_modules_list_those_there_are(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="q_proj") as caught:
        run(settings, tmp_path, target_modules=("query",))
    assert "query" in caught.value.what


def test_a_missing_tracker_is_told_before_training(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    try:
        import comet_ml  # noqa: F401
    except ImportError:
        with pytest.raises(TrainingError, match="report_to"):
            run(settings, tmp_path, report_to="comet_ml")


@pytest.mark.parametrize(
    ("optimizer", "module", "package"),
    [("schedule_free_adamw", "schedulefree", "schedulefree"), ("stable_adamw", "optimi", "torch-optimi")],
)
def test_the_missing_package_of_an_optimizer_is_named_before_anything_is_read(
    settings: dict[str, Any], tmp_path: Path, optimizer: str, module: str, package: str
) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"needs the package {package}"):
        run(settings, tmp_path, optimizer=optimizer)
    assert not list(tmp_path.iterdir())


def test_an_optimizer_that_transformers_cannot_make_is_told_without_a_traceback(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.core.training.job._OPTIMIZER_PACKAGES", {})
    if importlib.util.find_spec("grokadamw") is None:
        with pytest.raises(TrainingError, match="grokadamw"):
            run(settings, tmp_path, optimizer="grokadamw")


def test_a_full_disk_keeps_the_checkpoints_there_are(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_path = tmp_path / "run" / "checkpoints" / "checkpoint-6" / "scheduler.pt"

    def save_onto_full_disk(model: Any, directory: Path) -> None:
        save_weights(model, directory)
        if directory == state_path.parent:
            state_path.symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr("tasks.core.training.trainer.save_weights", save_onto_full_disk)
        with pytest.raises(StorageError, match="checkpoint-6") as caught:
            run(settings, tmp_path)
    assert "goes on from the newest whole checkpoint" in str(caught.value.next_step)
    newest = checkpoints.newest_whole(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "checkpoint-3"
    state_path.unlink()
    assert_same_weights(weights(run(settings, tmp_path)), weights(run(settings, tmp_path, "undisturbed")))


def test_a_model_that_cannot_be_published_is_published_without_another_step(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    steps: list[int] = []

    def take_the_place(progress: TrainingProgress) -> None:
        steps.append(progress.step)
        if progress.step == 10:
            (tmp_path / "run" / ".publishing").write_text("")

    config = FineTunerConfig(**settings)
    with pytest.raises(StorageError, match=r"run cannot be written"):
        train(config, models_dir=tmp_path, run_name="run", on_progress=take_the_place)
    (tmp_path / "run" / ".publishing").unlink()
    steps.clear()
    again = train(
        config, models_dir=tmp_path, run_name="run", on_progress=lambda seen: steps.append(seen.step)
    )
    assert steps == [] and again.manifest.steps == 10
    assert registry.why_incomplete(again.model_dir) is None


# ---------------------------------------------------------------- memory


def test_a_smaller_plan_keeps_the_rows_of_a_step_until_one_row_is_left() -> None:
    plan: BatchPlan | None = BatchPlan(6, 4, 8)
    seen = []
    while plan is not None:
        assert plan.micro_batch * plan.accumulation == 24
        seen.append((plan.micro_batch, plan.validation_batch))
        plan = plan.smaller()
    assert seen == [(6, 8), (3, 4), (1, 2), (1, 1)]


MEMORY_CHILD = """
import ctypes, json, logging, resource, sys
from pathlib import Path
import psutil, torch
torch.set_num_threads(1)
# What is freed leaves the address space at once, whatever lies beside it in the heap.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
logging.basicConfig(level="INFO", stream=sys.stdout)
from tasks.core.config import FineTunerConfig
from tasks.core.errors import TuneproofError
from tasks.core.training.run import train
import tasks.core.training.session as session

settings, models_dir, extra_mib = json.loads(sys.argv[1])
load = session.load_model_and_tokenizer
def load_then_limit(spec):
    loaded = load(spec)
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        limit = psutil.Process().memory_info().vms + extra_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return loaded
session.load_model_and_tokenizer = load_then_limit
try:
    trained = train(FineTunerConfig(**settings), models_dir=Path(models_dir), run_name="run")
    print("RESULT", json.dumps([event.model_dump() for event in trained.manifest.memory_events]))
    print("ROWS", trained.manifest.settings["rows_at_once"], trained.manifest.settings["pieces_in_step"])
except TuneproofError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hungry_settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """64 rows of about 600 tokens at once need about 900 MB; half of them half of it."""
    path = tmp_path / "long.jsonl"
    rows = [{"question": f"{i} apples " * 200, "answer": "books " * 60 + str(i)} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"training_data_id": str(path), "device_train_batch_size": 64, "grad_accumulation": 1}
    return {**settings, **changes, "epochs": 1, "learning_rate": 1e-3}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory with RLIMIT_AS")
def test_when_memory_runs_out_the_step_is_cut_into_smaller_pieces(
    hungry_settings: dict[str, Any], tmp_path: Path
) -> None:
    process = child(MEMORY_CHILD, hungry_settings, str(tmp_path), 500)
    assert "RESULT" in process.stdout, process.stdout + process.stderr
    events = json.loads(process.stdout.split("RESULT ")[1].splitlines()[0])
    assert events and events[0]["rows"] == 64 and events[0]["limit_rows"] == 32
    rows, pieces = process.stdout.split("ROWS ")[1].split()[:2]
    assert int(rows) < 64 and int(rows) * int(pieces) == 64
    assert "going on with 32" in process.stdout


def test_after_running_out_of_memory_training_goes_on_from_the_newest_checkpoint(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from tasks.core.training.trainer import AnswerTrainer

    settings["lora_dropout"] = 0.0
    undisturbed = run(settings, tmp_path, "undisturbed")
    real_step, failures = AnswerTrainer.training_step, ["mps backend out of memory"]

    def step(self: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 4 and failures:
            raise RuntimeError(failures.pop())
        return real_step(self, *arguments)

    monkeypatch.setattr(AnswerTrainer, "training_step", step)
    caplog.set_level("INFO")
    result = run(settings, tmp_path, "short")
    assert "checkpoint-3 (step 3 of 10)" in caplog.text
    assert_same_weights(weights(undisturbed), weights(result), tolerance=2e-4)
    assert result.manifest.memory_events[0].limit_rows == 2


def test_out_of_memory_with_one_row_says_what_to_change(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fit_once(job: Any, checkpoints_dir: Path, plan: BatchPlan, *others: Any) -> None:
        tried.append(plan.micro_batch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(fitting, "fit_once", fit_once)
    with pytest.raises(OutOfMemoryError, match="max_sequence_length") as caught:
        run(settings, tmp_path)
    assert tried == [4, 2, 1]
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# ---------------------------------------------------------------- the Hub


class FakeHub:
    """Stands in for huggingface_hub.HfApi: keeps what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = False

    def whoami(self) -> dict[str, str]:
        return {"name": "someone"}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append((repo_id, options))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, **options: Any) -> None:
        if self.fails:
            raise OSError("connection lost")
        self.calls.append(("upload", options))


def test_a_finished_model_is_pushed_as_private_without_its_checkpoints(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    hub.fails = True
    with pytest.raises(TrainingError, match="is complete, but"):
        run(settings, tmp_path, push_to_hub=True, epochs=0.2)
    assert registry.why_incomplete(tmp_path / "run") is None
    hub.fails, hub.calls = False, []
    assert run(settings, tmp_path, push_to_hub=True, epochs=0.2).reused
    (repo_id, options), (_, upload) = hub.calls
    assert repo_id == "someone/run" and options["private"] is True
    assert "checkpoints/**" in upload["ignore_patterns"]


# ---------------------------------------------------------------- small parts


def test_points_of_the_loss_curve_join_training_and_validation_of_a_step() -> None:
    log = [
        {"step": 0, "epoch": 0, "eval_loss": 3.0},
        {"step": 2, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-3},
        {"step": 2, "epoch": 0.5, "eval_loss": 1.5},
        {"step": 2, "epoch": 0.5, "train_runtime": 9.0},
    ]
    points = loss_points(log)
    assert [(p.step, p.loss, p.validation_loss) for p in points] == [(0, None, 3.0), (2, 2.0, 1.5)]


def test_importing_the_library_door_loads_no_torch_and_no_prefect() -> None:
    code = "import sys, tasks.finetuner; print([m for m in ('torch', 'transformers', 'prefect') if m in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert process.stdout.strip() == "[]"
