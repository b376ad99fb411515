"""The published model is the checkpoint with the best validation loss, whatever happens on the way."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.config import FineTunerConfig
from tasks.core.errors import RunKeyMismatchError, TrainingError
from tasks.core.models.trained import registry
from tasks.core.records import ModelManifest
from tasks.core.training import checkpoints
from tasks.core.training.run import TrainedModel, train
from tasks.core.training.trainer import AnswerTrainer
from tasks.core.training.validation import best_validation, is_exhausted
from tests.training.test_training import CHILD, child

WEIGHTS = "adapter_model.safetensors"
THINGS = ["apples", "books", "coins", "flowers", "pencils", "marbles", "tickets"]


def write_rows(path: Path, seed: int) -> Path:
    """Answers that cannot be foreseen: what is learnt of them by heart makes the validation loss rise again."""
    draw = random.Random(seed)
    rows = [
        {"question": f"What has Anna {i}?", "answer": f"{draw.randrange(100)} {draw.choice(THINGS)}"}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def settings(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sixteen updates, a checkpoint at every third; the validation loss is lowest after update 6."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(write_rows(folder / "train.jsonl", 1)),
        "validation_data_id": str(write_rows(folder / "validation.jsonl", 2)),
        "epochs": 8,
        "device_train_batch_size": 8,
        "grad_accumulation": 1,
        "rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "save_steps": 3,
        "save_total_limit": 1,
        "log_steps": 1,
        "device": "cpu",
    }


def run(settings: dict[str, Any], models_dir: Path, run_name: str = "run", **changes: Any) -> TrainedModel:
    return train(FineTunerConfig(**{**settings, **changes}), models_dir=models_dir, run_name=run_name)


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return run(settings, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def killed_dir(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models directory of a training killed at update 13, after the best; copy, do not use it."""
    return killed(settings, tmp_path_factory.mktemp("killed"), die_at=13)


def killed(settings: dict[str, Any], models_dir: Path, *, die_at: int) -> Path:
    process = child(CHILD, settings, str(models_dir), "run", die_at)
    assert process.returncode == -signal.SIGKILL, process.stderr
    return models_dir


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def checkpoint_names(model_dir: Path) -> list[str]:
    return sorted(path.name for path in (model_dir / "checkpoints").iterdir())


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------- the best is published


def test_the_model_is_the_checkpoint_with_the_lowest_validation_loss(undisturbed: TrainedModel) -> None:
    manifest, model_dir = undisturbed.manifest, undisturbed.model_dir
    seen = {p.step: p.validation_loss for p in manifest.losses if p.validation_loss is not None and p.step}
    assert manifest.best_step == min(seen, key=lambda step: seen[step] or 0.0)
    assert manifest.best_step < manifest.steps == manifest.planned_steps == 16
    assert manifest.best_validation_loss == min(loss for loss in seen.values() if loss is not None)
    assert manifest.final_validation_loss == seen[16] and not manifest.stopped_early
    assert_equal(weights(model_dir), weights(model_dir / "checkpoints" / f"checkpoint-{manifest.best_step}"))


def test_the_published_weights_have_the_best_validation_loss(
    undisturbed: TrainedModel, settings: dict[str, Any]
) -> None:
    from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
    from tasks.core.training.methods.sft import read_training_data
    from tests.training.test_training import own_loss

    loaded = load_model_and_tokenizer(ModelSpec(str(undisturbed.model_dir), device="cpu"))
    validation = read_training_data(FineTunerConfig(**settings), loaded.tokenizer).validation
    assert validation is not None
    with torch.no_grad():
        loss = own_loss(loaded.model, validation.rows).item()
    assert loss == pytest.approx(undisturbed.manifest.best_validation_loss, rel=1e-4)


def test_rotation_keeps_the_best_besides_the_newest(undisturbed: TrainedModel) -> None:
    assert checkpoint_names(undisturbed.model_dir) == ["checkpoint-16", "checkpoint-6"]


def test_a_full_model_is_published_from_its_best_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    trained = run(settings, tmp_path, full_finetuning=True, learning_rate=1e-2)
    best_dir = trained.model_dir / "checkpoints" / f"checkpoint-{trained.manifest.best_step}"
    assert trained.manifest.best_step != trained.manifest.steps
    assert_equal(
        load_file(trained.model_dir / "model.safetensors"), load_file(best_dir / "model.safetensors")
    )


def test_the_card_names_the_update_and_its_loss(undisturbed: TrainedModel) -> None:
    card = (undisturbed.model_dir / "README.md").read_text()
    loss = undisturbed.manifest.best_validation_loss
    assert f"| Best validation loss | {loss:.4f}, after update 6: these weights |" in card


def test_without_validation_the_last_weights_are_published(settings: dict[str, Any], tmp_path: Path) -> None:
    trained = run(settings, tmp_path, validation_data_id=None, epochs=2)
    assert trained.manifest.best_step is None and trained.manifest.best_validation_loss is None
    assert_equal(weights(trained.model_dir), weights(trained.model_dir / "checkpoints" / "checkpoint-4"))


def test_a_training_that_only_makes_it_worse_says_so(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_model_dir: Path
) -> None:
    base_dir = run(settings, tmp_path, "base", epochs=3).model_dir
    run(settings, tmp_path, base_model_id=str(base_dir), learning_rate=1.0, epochs=1, max_grad_norm=0)
    assert "no validation loss is below that of the untrained model" in caplog.text


# ---------------------------------------------------------------- crashes and damage


def test_a_training_killed_around_its_best_publishes_the_same_weights(
    settings: dict[str, Any], undisturbed: TrainedModel, tmp_path: Path
) -> None:
    resumed = run(settings, killed(settings, tmp_path, die_at=7))
    assert_equal(weights(undisturbed.model_dir), weights(resumed.model_dir))
    assert resumed.manifest.best_step == undisturbed.manifest.best_step
    assert resumed.manifest.best_validation_loss == undisturbed.manifest.best_validation_loss


def test_a_training_killed_after_its_best_publishes_it(
    settings: dict[str, Any], undisturbed: TrainedModel, killed_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed_dir, tmp_path, dirs_exist_ok=True)
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-12", "checkpoint-6"]
    resumed = run(settings, tmp_path)
    assert_equal(weights(undisturbed.model_dir), weights(resumed.model_dir))
    assert checkpoint_names(resumed.model_dir) == ["checkpoint-16", "checkpoint-6"]


@pytest.mark.parametrize("damage", ["one bit", "gone", "cut", "losses"])
def test_a_damaged_best_checkpoint_is_trained_again(
    settings: dict[str, Any],
    undisturbed: TrainedModel,
    killed_dir: Path,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(killed_dir, tmp_path, dirs_exist_ok=True)
    best_dir = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    if damage == "one bit":
        flip_last_byte(best_dir / WEIGHTS)
    elif damage == "losses":
        flip_last_byte(best_dir / "trainer_state.json")
    elif damage == "cut":
        (best_dir / WEIGHTS).write_bytes(b"")
    else:
        shutil.rmtree(best_dir)
    resumed = run(settings, tmp_path)
    assert "the best checkpoint, checkpoint-6, is damaged or gone" in caplog.text
    assert_equal(weights(undisturbed.model_dir), weights(resumed.model_dir))


def test_a_newest_checkpoint_with_a_flipped_bit_is_not_gone_on_from(
    settings: dict[str, Any], undisturbed: TrainedModel, killed_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed_dir, tmp_path, dirs_exist_ok=True)
    flip_last_byte(tmp_path / "run" / "checkpoints" / "checkpoint-12" / WEIGHTS)
    assert_equal(weights(undisturbed.model_dir), weights(run(settings, tmp_path).model_dir))


def test_a_best_checkpoint_that_is_damaged_at_the_end_is_an_error_and_no_other_model(
    settings: dict[str, Any], undisturbed: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AnswerTrainer.training_step

    def damaging(self: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 14:
            flip_last_byte(Path(self.args.output_dir) / "checkpoint-6" / WEIGHTS)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "training_step", damaging)
        with pytest.raises(TrainingError, match="checkpoint-6 has the lowest validation loss"):
            run(settings, tmp_path)
    assert registry.why_incomplete(tmp_path / "run") is not None
    assert_equal(weights(undisturbed.model_dir), weights(run(settings, tmp_path).model_dir))


def test_a_crash_while_publishing_repeats_no_update_and_publishes_the_best(
    settings: dict[str, Any], undisturbed: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path, early_stopping_patience=3)
    monkeypatch.setattr(AnswerTrainer, "training_step", None)  # a further update would fail
    finished = run(settings, tmp_path, early_stopping_patience=3)
    assert finished.manifest.stopped_early and finished.manifest.best_step == 6
    assert_equal(weights(undisturbed.model_dir), weights(finished.model_dir))


# ---------------------------------------------------------------- early stopping


def test_training_ends_when_the_validation_loss_no_longer_falls(
    settings: dict[str, Any], undisturbed: TrainedModel, tmp_path: Path
) -> None:
    trained = run(settings, tmp_path, early_stopping_patience=2)
    manifest = trained.manifest
    assert manifest.stopped_early
    assert (manifest.best_step, manifest.steps, manifest.planned_steps) == (6, 9, 16)  # worse after 8 and 9
    assert [p for p in undisturbed.manifest.losses if p.step <= 9] == list(manifest.losses)
    assert_equal(weights(undisturbed.model_dir), weights(trained.model_dir))
    assert "stopped early" in (trained.model_dir / "README.md").read_text()


def test_early_stopping_comes_at_the_same_update_after_a_crash(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AnswerTrainer.training_step

    def failing(self: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "training_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path, early_stopping_patience=3)
    resumed = run(settings, tmp_path, early_stopping_patience=3)
    assert (resumed.manifest.best_step, resumed.manifest.steps) == (6, 10)


def test_early_stopping_without_validation_data_is_refused() -> None:
    with pytest.raises(ValueError, match="validation_data_id"):
        FineTunerConfig(early_stopping_patience=2)


def log(*losses: float) -> list[dict[str, Any]]:
    return [{"step": 10 * at, "eval_loss": loss} for at, loss in enumerate(losses)]


def test_the_untrained_model_is_never_the_best_and_the_earliest_of_equals_is() -> None:
    best = best_validation(log(0.1, 3.0, 2.0, 2.0, 2.5))
    assert best is not None and (best.step, best.loss) == (20, 2.0)
    assert best_validation(log(0.1)) is None


def test_patience_counts_validations_since_the_best() -> None:
    course = log(9.0, 3.0, 2.0, 2.0, 2.5)
    assert [is_exhausted(course, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]


# ---------------------------------------------------------------- what belongs to a training


def test_how_often_is_validated_belongs_to_a_training_with_validation_data(
    settings: dict[str, Any], undisturbed: TrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(RunKeyMismatchError, match="updates between validations: 3 -> 4"):
        run(settings, undisturbed.model_dir.parent, save_steps=4)
    first = run(settings, tmp_path, validation_data_id=None, epochs=1)
    assert run(settings, tmp_path, validation_data_id=None, epochs=1, save_steps=4).reused
    assert first.manifest.steps == 2


def test_a_manifest_of_an_earlier_version_can_be_read(undisturbed: TrainedModel) -> None:
    later = {"best_step", "best_validation_loss", "planned_steps", "stopped_early"}
    content = undisturbed.manifest.model_dump(mode="json", exclude=later)
    manifest = ModelManifest.model_validate(content)
    assert manifest.best_step is None and not manifest.stopped_early


def test_a_checkpoint_of_an_earlier_version_is_intact_without_sums(
    undisturbed: TrainedModel, tmp_path: Path
) -> None:
    checkpoint_dir = tmp_path / "checkpoint-16"
    shutil.copytree(undisturbed.model_dir / "checkpoints" / "checkpoint-16", checkpoint_dir)
    seal = json.loads((checkpoint_dir / "complete.json").read_text())
    del seal["file_sha256"]
    (checkpoint_dir / "complete.json").write_text(json.dumps(seal))
    assert checkpoints.is_intact(checkpoint_dir)
