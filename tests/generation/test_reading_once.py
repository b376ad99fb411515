"""The test data is read once a run, wherever its rows are answered, and each of its files is hashed once."""

from __future__ import annotations

import builtins
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.answering import repeat_some_rows
from tasks.core.config import Config, load_config
from tasks.core.evaluation.noise import find_repeat
from tasks.core.records import Example
from tasks.core.runs.run_dir import RunDir
from tasks.inferencer import Inferencer
from tests.making.warm.children import warm_children  # noqa: F401

ROWS = 24
NOTES = "TUNEPROOF_TEST_NOTES"


class Counted(Inferencer):
    """Adds a line to the file that the environment names when data is opened, and when its rows are read."""

    def load_dataset(self) -> Any:
        _note("open")
        return super().load_dataset()

    def examples(self, dataset: Any) -> Iterator[Example]:
        _note("read")
        yield from super().examples(dataset)


def _note(what: str) -> None:
    with Path(os.environ[NOTES]).open("a") as file:
        file.write(f"{what}\n")


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "notes"
    monkeypatch.setenv(NOTES, str(path))
    return path


@pytest.fixture
def questions_path(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"How many {'legs ' * (n % 5)}has dog {n}?", "answer": str(n)} for n in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def overrides(
    tmp_path: Path,
    tiny_model_dir: Path,
    questions_path: Path,
    own_cache: Path,
    warm_children: None,  # noqa: F811
) -> dict[str, Any]:
    return {
        "inferencer.model": str(tiny_model_dir), "inferencer.testing_data_id": str(questions_path),
        "inferencer.max_new_tokens": 4, "inferencer.temperature": 0, "inferencer.device": "cpu",
        "inferencer.run_name": "run", "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"),
    }  # fmt: skip


def config(overrides: dict[str, Any], **more: Any) -> Config:
    return load_config(None, {**overrides, **{f"inferencer.{key}": value for key, value in more.items()}})


def readings(notes: Path) -> Counter[str]:
    return Counter(notes.read_text().split())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"isolation": "process"},
        {"num_shards": 3, "shard_runner": "threads"},
        {"num_shards": 2, "shard_runner": "processes", "shard_processes": 2},
    ],
    ids=["here", "in a child", "shards in turn", "shards in processes"],
)
def test_a_run_reads_its_data_once_wherever_it_is_answered(
    overrides: dict[str, Any], notes: Path, more: dict[str, Any]
) -> None:
    manifest = Counted(config(overrides, **more)).infer()
    assert (manifest.row_count, manifest.error_count) == (ROWS, 0)
    assert manifest.reference_tokens  # prompts, references and published file need all rows
    assert readings(notes) == {"open": 1, "read": 1}


def test_rows_that_are_answered_again_for_the_noise_are_not_read_again(
    overrides: dict[str, Any], notes: Path
) -> None:
    noisy = {**overrides, "inferencer.dtype": "bfloat16", "gate.noise_rows": 16}
    inferencer = Counted(config(noisy))
    plan = inferencer.plan()
    manifest = inferencer.complete(plan)
    repeat_some_rows.fn(inferencer, plan, manifest)
    repeat_path = find_repeat(plan.run.path)
    assert repeat_path is not None and RunDir(repeat_path).read_manifest().row_count == 16
    assert readings(notes) == {"open": 1, "read": 1}


def test_a_finished_run_reads_its_data_once_to_know_that_it_is_finished(
    overrides: dict[str, Any], notes: Path
) -> None:
    first = Counted(config(overrides)).infer()
    notes.unlink()
    assert Counted(config(overrides)).infer() == first
    assert readings(notes) == {"open": 1, "read": 1}


def test_each_file_of_the_data_is_opened_and_hashed_once(
    overrides: dict[str, Any], notes: Path, questions_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Counted(config(overrides)).load_dataset()  # writes the copy that later runs map into memory
    plain_open, opened = io.open, Counter[str]()

    def counted(file: Any, *arguments: Any, **named: Any) -> Any:
        opened[str(file)] += 1
        return plain_open(file, *arguments, **named)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    Counted(config(overrides)).infer()
    assert opened[str(questions_path)] == 1


@pytest.mark.parametrize(
    ("isolation", "expected"), [("none", {"open": 1, "read": 1}), ("process", {"open": 2, "read": 2})]
)
def test_data_that_memory_should_not_hold_is_read_once_more_by_a_child_only(
    overrides: dict[str, Any],
    notes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    isolation: str,
    expected: dict[str, int],
) -> None:
    usual = Counted(config({**overrides, "pipeline.runs_dir": str(tmp_path / "usual")})).run()
    notes.unlink()
    monkeypatch.setattr("tasks.core.runs.kept_rows.MOST_BYTES_KEPT", 1000)
    rows = Counted(config(overrides, isolation=isolation)).run()
    assert [(row.id, row.predicted_answer) for row in rows] == [
        (row.id, row.predicted_answer) for row in usual
    ]
    assert readings(notes) == expected
