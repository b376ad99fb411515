"""The quickstart's questions are what their script writes, and its settings load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.config import load_config

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def normalised(question: str) -> str:
    return " ".join(question.lower().split())


def test_the_script_writes_exactly_the_files_that_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    subprocess.run([sys.executable, QUICKSTART / "write_questions.py", tmp_path], check=True)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


def test_no_test_question_is_a_training_question() -> None:
    train = {normalised(row["question"]) for row in rows("train.jsonl")}
    test = {normalised(row["question"]) for row in rows("test.jsonl")}
    assert (len(train), len(test)) == (300, 100)
    assert not train & test


def test_every_answer_is_one_word_that_both_files_know() -> None:
    answers = {name: {row["answer"] for row in rows(name)} for name in ("train.jsonl", "test.jsonl")}
    assert answers["test.jsonl"] <= answers["train.jsonl"]
    assert all(answer.isalpha() for answer in answers["train.jsonl"])


def test_the_settings_load_and_name_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TUNEPROOF_")]:
        monkeypatch.delenv(name)
    config = load_config(QUICKSTART / "config.toml")
    assert (ROOT / str(config.fine_tuner.required_training_data_id)).is_file()
    assert (ROOT / str(config.inferencer.required_testing_data_id)).is_file()
    assert config.fine_tuner.system_prompt_override_text == config.inferencer.system_prompt_override_text
