"""How many updates there are, the learning rate over them, and a training that cannot learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from tasks.core.config import FineTunerConfig
from tasks.core.config.sections import SchedulerName
from tasks.core.errors import TrainingError
from tasks.core.models.trained import registry
from tasks.core.training.methods.rows import TokenizedRows
from tasks.core.training.run import TrainedModel, train
from tasks.core.training.schedule import from_above_zero, schedule_of, warmup_updates
from tasks.core.training.trainer import AnswerTrainer

PEAK = 0.01


def sums(path: Path, count: int) -> Path:
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tiny_model_dir: Path, folder: Path, rows: int, **changes: Any) -> TrainedModel:
    settings = {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(sums(folder / "rows.jsonl", rows)),
        "log_steps": 1,
        "learning_rate": PEAK,
        "device": "cpu",
        **changes,
    }
    return train(FineTunerConfig(**settings), models_dir=folder / "models", run_name="run")


def rates(trained: TrainedModel) -> list[float]:
    return [point.learning_rate for point in trained.manifest.losses if point.learning_rate is not None]


def course(name: str, warmup: int, updates: int) -> tuple[list[float], list[float]]:
    """The rates of each update: with our warm-up, and as transformers has them."""
    both = []
    for ours in (True, False):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
        scheduler = get_scheduler(name, optimizer, warmup, updates)
        if ours and warmup:
            from_above_zero(scheduler, warmup)
        seen = []
        for _ in range(updates):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        both.append(seen)
    return both[0], both[1]


# ---------------------------------------------------------------- the course of the rate


@pytest.mark.parametrize("name", [name for name in get_args(SchedulerName) if name != "reduce_lr_on_plateau"])
@pytest.mark.parametrize("updates", [1, 2, 3, 7, 21, 200])
def test_every_update_has_a_rate_above_0_and_one_has_the_peak(name: str, updates: int) -> None:
    warmup = warmup_updates(FineTunerConfig(lr_scheduler_type=name), updates)
    ours, _ = course(name, warmup, updates)
    assert min(ours) > 0
    assert max(ours) == pytest.approx(PEAK)
    assert ours[:warmup] == pytest.approx([PEAK * (k + 1) / warmup for k in range(warmup)])


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"])
def test_after_the_warm_up_the_rates_are_those_of_transformers(name: str) -> None:
    ours, theirs = course(name, 5, 40)
    assert ours[5:] == theirs[5:]
    assert ours[:4] == theirs[1:5]  # and in it they come one update earlier
    ours, theirs = course(name, 0, 40)
    assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "updates", "warmup"),
    [
        ({}, 1, 0),
        ({}, 3, 1),
        ({}, 7, 3),
        ({}, 2000, 5),
        ({"warmup_steps": 400}, 1000, 400),
        ({"warmup_steps": 400}, 600, 300),
        ({"warmup_ratio": 0.1}, 1000, 100),
        ({"warmup_ratio": 0.1}, 3, 1),
        ({"warmup_ratio": 0.0}, 1000, 0),
        ({"warmup_ratio": 0.03, "warmup_steps": 70}, 1000, 30),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, 1000, 0),
    ],
)
def test_the_warm_up_fits_into_the_updates_there_are(
    settings: dict[str, Any], updates: int, warmup: int
) -> None:
    assert warmup_updates(FineTunerConfig(**settings), updates) == warmup


def test_twelve_rows_reach_the_peak_rate_with_the_warm_up_of_a_long_training(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    seen = rates(run(tiny_model_dir, tmp_path, 12, grad_accumulation=4, warmup_steps=5))
    assert len(seen) == 3 and min(seen) > 0
    assert max(seen) == pytest.approx(PEAK)


def test_one_row_is_learnt_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained = run(tiny_model_dir, tmp_path, 1, epochs=2)
    first, last = (trained.manifest.losses[at].loss for at in (0, -1))
    assert first is not None and last is not None and last < first
    assert trained.manifest.steps == 2


def test_the_rates_of_a_training_are_those_of_its_schedule(tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = {"device_train_batch_size": 2, "grad_accumulation": 1, "epochs": 1, "warmup_steps": 3}
    seen = rates(run(tiny_model_dir, tmp_path, 20, lr_scheduler_type="cosine", **changes))
    assert seen == pytest.approx(course("cosine", 3, 10)[0])


def test_a_training_cut_in_its_warm_up_goes_on_with_the_rates_of_an_undisturbed_one(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"device_train_batch_size": 2, "grad_accumulation": 1, "epochs": 1, "save_steps": 2}
    step = AnswerTrainer.training_step

    def failing(self: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "training_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model_dir, tmp_path, 20, warmup_ratio=0.5, **changes)
    seen = rates(run(tiny_model_dir, tmp_path, 20, warmup_ratio=0.5, **changes))
    assert seen == pytest.approx(course("linear", 5, 10)[0])


# ---------------------------------------------------------------- what is told beforehand


def rows_of(count: int, *, learnt: int = 3) -> TokenizedRows:
    return TokenizedRows([(range(10), [-100] * (10 - learnt) + list(range(learnt))) for _ in range(count)])


@pytest.mark.parametrize(
    ("rows", "epochs", "updates"), [(100, 3.0, 39), (100, 0.5, 7), (1, 1.0, 1), (17, 2.0, 6)]
)
def test_updates_are_counted_as_the_trainer_counts_them(
    rows: int, epochs: float, updates: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"device_train_batch_size": 4, "grad_accumulation": 2, "epochs": epochs}
    assert schedule_of(FineTunerConfig(**changes), rows_of(rows)).updates == updates
    if rows < 20:
        assert run(tiny_model_dir, tmp_path, rows, **changes).manifest.steps == updates


def test_packed_rows_are_counted_in_sequences() -> None:
    config = FineTunerConfig(packing=True, max_sequence_length=40, device_train_batch_size=5, epochs=2)
    config = config.model_copy(update={"grad_accumulation": 1})
    schedule = schedule_of(config, rows_of(100))
    assert (schedule.rows, schedule.sequences, schedule.updates) == (100, 25, 10)


def test_rows_learnt_tokens_and_updates_are_told_before_training(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(tiny_model_dir, tmp_path, 12, device_train_batch_size=2, grad_accumulation=2, epochs=2)
    told = next(record for record in caplog.records if "updates: " in record.getMessage())
    assert "12 rows, " in told.getMessage() and "updates: 6 (4 rows each, 2 epochs" in told.getMessage()
    (warning,) = [r.getMessage() for r in caplog.records if "updates only" in r.getMessage()]
    assert "raise epochs (now 2)" in warning and "device_train_batch_size" in warning


def test_there_is_no_warning_where_there_are_updates_enough() -> None:
    config = FineTunerConfig(device_train_batch_size=4, grad_accumulation=2)
    assert schedule_of(config, rows_of(400)).warning is None
    assert schedule_of(config, rows_of(100)).warning is not None


# ---------------------------------------------------------------- a training that learns nothing


def test_rows_without_a_learnt_token_are_refused() -> None:
    with pytest.raises(TrainingError, match="ground_truth_column"):
        schedule_of(FineTunerConfig(), rows_of(5, learnt=0))


def test_a_training_that_changed_no_weight_is_an_error_and_no_model(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An optimizer that never steps, as the one of float16 whose every step overflows.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(TrainingError, match="no weight has changed in 2 updates"):
        run(tiny_model_dir, tmp_path, 2, epochs=2)
    assert registry.why_incomplete(tmp_path / "models" / "run") is not None


def test_a_rate_too_small_for_any_weight_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"full_finetuning": True, "learning_rate": 1e-25, "weight_decay": 0.0, "epochs": 1}
    with pytest.raises(TrainingError, match="learning_rate"):
        run(tiny_model_dir, tmp_path, 4, **settings)
