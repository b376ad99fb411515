"""The whole story on small models: a start, a better model, the same again, a damaged one, and the way back.

The models learn which word belongs to which name. The first knows two names of three, the second all, the
third is the second trained again, the fourth is trained on shuffled answers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tasks.core.config import Config, load_config
from tasks.core.models.trained.discovery import discover_model
from tasks.core.models.trained.registry import promoted_run
from tasks.core.promotion.promotion import promotion_history
from tasks.promoter import Promoter

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult

pytestmark = pytest.mark.slow

WORDS = {"Anna": "apples", "Ben": "books", "Carla": "coins"}
VERBS = ("has", "buys", "sells", "finds", "loses", "shares")
RUNS = ("start", "better", "again", "damaged")


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training rows of each run, and 60 test rows."""
    folder = tmp_path_factory.mktemp("gate")
    rows = [
        {"question": f"{name} {verb} {number} things. Which?", "answer": word}
        for number in range(2, 12)
        for name, word in WORDS.items()
        for verb in VERBS
    ]
    random.Random(0).shuffle(rows)
    train, test = rows[:120], rows[120:]
    answers = [row["answer"] for row in train]
    random.Random(1).shuffle(answers)
    shuffled = [{**row, "answer": answer} for row, answer in zip(train, answers, strict=True)]
    without_carla = [row for row in train if not row["question"].startswith("Carla")]
    parts = {"start": without_carla, "better": train, "again": train, "damaged": shuffled, "test": test}
    return {name: write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def story(data: dict[str, Path], tiny_model_dir: Path, prefect_api: str) -> dict[str, PipelineResult]:
    """The pipeline, run once for each model in turn."""
    from flows.pipeline import finetune_infer_evaluate

    return {name: finetune_infer_evaluate(settings(data, name, tiny_model_dir)) for name in RUNS}


def settings(data: dict[str, Path], name: str, base: Path) -> Config:
    folder = data["test"].parent
    chosen = {
        "fine_tuner.base_model_id": str(base),
        "fine_tuner.training_data_id": str(data[name]),
        "fine_tuner.run_name": name,
        "fine_tuner.epochs": 6,
        "fine_tuner.learning_rate": 0.01,
        "fine_tuner.lora_alpha": 16,
        "fine_tuner.lora_dropout": 0,
        "fine_tuner.device_train_batch_size": 20,
        "fine_tuner.grad_accumulation": 1,
        "fine_tuner.max_sequence_length": 128,
        "fine_tuner.save_steps": 1000,
        "inferencer.testing_data_id": str(data["test"]),
        "inferencer.run_name": name,
        "inferencer.max_sequence_length": 128,
        "inferencer.max_new_tokens": 6,
        "inferencer.temperature": 0,
        "evaluator.metrics": ["exact_match", "f1"],
        "evaluator.bootstrap_resamples": 1000,
        "pipeline.models_dir": str(folder / "models"),
        "pipeline.runs_dir": str(folder / "runs"),
    }
    return load_config(overrides=chosen, environ={})


def verdict(result: PipelineResult) -> tuple[str, str, str]:
    assert result.evaluation is not None and result.evaluation.verdict is not None
    found = result.evaluation.verdict
    return found.decision, found.against, found.against_run


def test_the_first_better_model_is_promoted_against_its_base(story: dict[str, PipelineResult]) -> None:
    decision, against, _ = verdict(story["start"])
    assert (decision, against) == ("promote", "base")
    assert story["start"].promotion is not None


def test_a_better_one_is_promoted_against_the_champion(story: dict[str, PipelineResult]) -> None:
    assert verdict(story["better"]) == ("promote", "champion", "start")
    assert story["better"].promotion is not None
    assert story["better"].champion == story["start"].candidate  # reused, not generated again


def test_the_same_model_again_is_inconclusive_and_not_promoted(story: dict[str, PipelineResult]) -> None:
    assert verdict(story["again"]) == ("inconclusive", "champion", "better")
    assert story["again"].promotion is None


def test_a_model_trained_on_shuffled_answers_is_rejected(story: dict[str, PipelineResult]) -> None:
    assert verdict(story["damaged"]) == ("reject", "champion", "better")
    assert story["damaged"].promotion is None


def test_the_promoted_model_is_the_better_one_and_rollback_gives_the_first(
    story: dict[str, PipelineResult], data: dict[str, Path], tiny_model_dir: Path
) -> None:
    config = settings(data, "better", tiny_model_dir)
    models_dir = Path(config.pipeline.models_dir)
    assert promoted_run(models_dir) == "better"
    restored, replaced = Promoter(config, by="anna").roll_back(reason="for the test")
    assert (restored.run_name, replaced.run_name) == ("start", "better")
    found = discover_model(model="promoted", hf_user_id=None, models_dir=models_dir)
    assert found.chosen.model_id == str(models_dir / "start")
    told = [(entry.action, entry.promotion.run_name) for entry in promotion_history(models_dir)]
    assert told == [("promote", "start"), ("promote", "better"), ("rollback", "start")]


def test_training_and_test_rows_were_compared_and_nothing_was_in_both(
    story: dict[str, PipelineResult],
) -> None:
    for result in story.values():
        assert result.evaluation is not None and result.evaluation.overlap is not None
        assert result.evaluation.overlap.share == 0
