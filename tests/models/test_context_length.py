"""A prompt beyond a model's own positions is cut or becomes an error row; it never ends the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import Config, load_config
from tasks.core.errors import ConfigError
from tasks.core.models.context_length import ContextLength, context_length
from tasks.inferencer import Inferencer
from tests.generation.engines.test_engines import build

POSITIONS = 256
LENGTHS = {"gpt2": ContextLength(POSITIONS, True), "llama": ContextLength(POSITIONS, False)}
LENGTHS |= dict.fromkeys(("gpt-neox", "phi", "gemma3"), LENGTHS["llama"])
LENGTHS["bloom"] = ContextLength(None, False)


@pytest.mark.parametrize("name", LENGTHS)
def test_only_models_without_rotary_positions_have_a_fixed_length(name: str) -> None:
    assert context_length(build(name, 64)) == LENGTHS[name]


def asking(folder: Path, name: str, tokenizer: Any, **more: Any) -> Config:
    """Settings that ask a tiny model with 256 positions one short question and one of about 1,000 tokens."""
    build(name, len(tokenizer)).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    rows = [{"question": text, "answer": "4"} for text in ("How many?", "How many apples has Anna? " * 150)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": str(folder / name), "testing_data_id": str(folder / "rows.jsonl"), "max_new_tokens": 12,
        "temperature": 0, "device": "cpu", "max_sequence_length": 4096, **more,
    }  # fmt: skip
    overrides = {f"inferencer.{key}": value for key, value in settings.items()}
    places = {f"pipeline.{kind}_dir": str(folder / kind) for kind in ("runs", "models")}
    return load_config(None, {**overrides, **places})


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("engine", ["inflight", "generate"])
def test_a_prompt_beyond_the_position_table_is_cut(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    with caplog.at_level(logging.WARNING):
        short, long = Inferencer(asking(tmp_path, "gpt2", tiny_tokenizer, engine=engine)).run()
    assert short.error is long.error is None
    assert short.metadata.truncated_prompt_tokens == 0
    assert long.metadata.truncated_prompt_tokens > 500
    assert long.metadata.prompt_tokens is not None
    assert POSITIONS - 20 < long.metadata.prompt_tokens + 12 <= POSITIONS
    assert "the model has 256 positions" in caplog.text


@pytest.mark.usefixtures("own_cache")
def test_a_prompt_beyond_the_position_table_is_an_error_row_where_so_configured(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    short, long = Inferencer(asking(tmp_path, "gpt2", tiny_tokenizer, long_prompts="refuse")).run()
    assert short.error is None
    assert "more than the 244 that fit" in (long.error or "")


@pytest.mark.usefixtures("own_cache")
def test_an_answer_as_long_as_the_position_table_is_a_clear_error(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens = 256 leaves no room.*256 positions"):
        Inferencer(asking(tmp_path, "gpt2", tiny_tokenizer, max_new_tokens=POSITIONS)).run()


@pytest.mark.usefixtures("own_cache")
def test_a_prompt_beyond_what_a_rotary_model_is_made_for_is_asked_with_a_warning(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, long = Inferencer(asking(tmp_path, "llama", tiny_tokenizer)).run()
    assert long.error is None
    assert long.metadata.truncated_prompt_tokens == 0
    assert caplog.text.count("more than the 256 that the model is made for") == 1
