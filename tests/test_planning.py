"""The dry run checks what the real run will do."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.core.config import load_config
from tasks.core.config.phases import FINE_TUNING, INFERENCE
from tasks.planning import make_plan
from tests.model_runs import make_run


def _rows(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"How many legs have {n} dogs?", "answer": str(4 * n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_validation_rows_are_those_that_training_takes(tmp_path: Path, tiny_model_dir: Path) -> None:
    _rows(tmp_path / "data" / "train.jsonl", 6)
    _rows(tmp_path / "data" / "validation.jsonl", 5)
    settings = {
        "fine_tuner.base_model_id": str(tiny_model_dir),
        "fine_tuner.training_data_id": str(tmp_path / "data"),
        "fine_tuner.validation_data_id": str(tmp_path / "data"),
        "fine_tuner.max_rows": 4,
        "pipeline.models_dir": str(tmp_path / "models"),
    }
    plan = make_plan(load_config(None, settings, {}), (FINE_TUNING,))
    assert not plan.problems
    assert dict(plan.phases[0].facts)["validation rows"] == f"4 of {tmp_path / 'data'}"


def test_what_is_learnt_and_in_how_many_updates_is_told_before_training(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    settings = {
        "fine_tuner.base_model_id": str(tiny_model_dir),
        "fine_tuner.training_data_id": str(_rows(tmp_path / "train.jsonl", 12)),
        "fine_tuner.device_train_batch_size": 4,
        "fine_tuner.grad_accumulation": 1,
        "pipeline.models_dir": str(tmp_path / "models"),
    }
    facts = dict(make_plan(load_config(None, settings, {}), (FINE_TUNING,)).phases[0].facts)
    learnt, total = (int(count) for count in facts["learnt tokens"].split(" of "))
    assert 24 <= learnt < total
    assert facts["updates"] == "9 (4 rows each, 3 epochs; warm-up in the first 4)"
    assert "9 updates only" in facts["warning"] and "raise epochs (now 3)" in facts["warning"]


def test_a_run_whose_model_is_not_there_tells_what_was_not_taken(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    make_run(tmp_path / "models", "newest", base=tiny_model_dir)
    settings = {
        "inferencer.run_name": "tuned",
        "inferencer.testing_data_id": str(_rows(tmp_path / "test.jsonl", 3)),
        "pipeline.models_dir": str(tmp_path / "models"),
        "pipeline.runs_dir": str(_rows(tmp_path / "runs", 1)),
    }
    plan = make_plan(load_config(None, settings, {}), (INFERENCE,))
    assert ("not taken", f"{tmp_path / 'models' / 'tuned'}: no such directory") in plan.phases[0].facts
    assert any("runs is a file" in problem for problem in plan.problems)
