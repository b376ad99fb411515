"""What inference would refuse after a training is refused before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.before_training import check_inference
from tasks.core.config import Config, load_config
from tasks.core.errors import ConfigError, DataError, ModelLoadError, RunKeyMismatchError


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path) -> dict[str, object]:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "How many legs?", "answer": "4"}\n')
    return {
        "fine_tuner.base_model_id": str(tiny_model_dir),
        "fine_tuner.training_data_id": str(tmp_path / "train.jsonl"),
        "inferencer.testing_data_id": str(tmp_path / "test.jsonl"),
        "inferencer.device": "cpu",
        "pipeline.models_dir": str(tmp_path / "models"),
        "pipeline.runs_dir": str(tmp_path / "runs"),
    }


def config_of(settings: dict[str, object], **more: object) -> Config:
    return load_config(overrides=settings | {name.replace("__", "."): value for name, value in more.items()})


def test_settings_that_inference_takes_are_taken(settings: dict[str, object]) -> None:
    check_inference(config_of(settings), is_next=True)
    check_inference(config_of(settings, fine_tuner__run_name="tuned"), is_next=True)


def test_test_data_of_several_files_are_taken(settings: dict[str, object], tmp_path: Path) -> None:
    files = [str(tmp_path / "test.jsonl"), str(tmp_path / "train.jsonl")]
    check_inference(config_of(settings, inferencer__testing_data_id=files), is_next=True)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"inferencer__run_name_prefix": "p" * 95}, ConfigError),
        ({"fine_tuner__run_name": "promoted"}, ConfigError),
        ({"inferencer__question_column": "quesion"}, DataError),
        ({"inferencer__device": "cuda:99"}, ModelLoadError),
    ],
)
def test_what_inference_refuses_is_refused(
    settings: dict[str, object], wrong: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        check_inference(config_of(settings, **wrong), is_next=True)


def test_a_run_of_another_model_is_in_the_way_of_a_pipeline_but_not_of_a_training_alone(
    settings: dict[str, object], tmp_path: Path
) -> None:
    config = config_of(settings, fine_tuner__run_name="tuned")
    run_dir = tmp_path / "runs" / "tuned-test"
    run_dir.mkdir(parents=True)
    (run_dir / "identity.json").write_text("{}")
    with pytest.raises(RunKeyMismatchError, match="tuned-test holds answers of another model"):
        check_inference(config, is_next=True)
    check_inference(config, is_next=False)
