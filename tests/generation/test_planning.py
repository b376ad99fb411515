"""The dry run checks what the real run will do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.core.config import load_config
from tasks.core.config.phases import EVALUATION, FINE_TUNING, INFERENCE
from tasks.dry_run import make_plan
from tests.making.model_runs import make_run


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


def test_a_dry_run_imports_no_module_of_the_users_own(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "code-ran"
    code = f"open({str(mark)!r}, 'w').close()\ndef score(row): return 1.0\nclass Engine: pass\n"
    (tmp_path / "own_metric_of_test.py").write_text(code)
    (tmp_path / "own_package_of_test").mkdir()
    (tmp_path / "own_package_of_test" / "__init__.py").write_text(code)
    (tmp_path / "own_package_of_test" / "inner.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    settings = {
        "inferencer.model": str(tiny_model_dir),
        "inferencer.engine": "own_metric_of_test:Engine",
        "inferencer.testing_data_id": str(_rows(tmp_path / "test.jsonl", 3)),
        "evaluator.metrics": ["exact_match", "own_metric_of_test:score", "own_package_of_test.inner:score"],
        "evaluator.baseline": "none",
        "pipeline.models_dir": str(tmp_path / "models"),
        "pipeline.runs_dir": str(tmp_path / "runs"),
    }

    plan = make_plan(load_config(None, settings, {}), (INFERENCE, EVALUATION))

    assert not plan.problems
    assert "own_metric_of_test:score" in dict(plan.phases[1].facts)["not imported"]
    assert not mark.exists()


def test_a_dry_run_tells_that_the_module_of_an_own_metric_is_not_there(tmp_path: Path) -> None:
    settings = {
        "evaluator.metrics": ["no_such_module_here:score"],
        "pipeline.runs_dir": str(tmp_path / "runs"),
    }

    plan = make_plan(load_config(None, settings, {}), (EVALUATION,))

    assert any("no_such_module_here" in problem for problem in plan.problems)
