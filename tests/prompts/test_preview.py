"""`tuneproof preview`: what is asked and learnt, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli.commands import run
from tasks.core.config import load_config
from tasks.core.prompts.preview import inference_rows, markdown, marked_text, training_rows, written_out
from tasks.core.prompts.tokens import PromptBuilder
from tasks.core.records import Example, Message
from tasks.previewing import preview
from tests.conftest import build_tiny_tokenizer
from tests.making.chat_templates import QWEN_3


def builder(**settings: Any) -> tuple[PromptBuilder, Any]:
    """Prompts of the tests' tokenizer."""
    tokenizer = build_tiny_tokenizer()
    return PromptBuilder(tokenizer, max_sequence_length=200, **settings), tokenizer


def test_what_is_learnt_stands_between_marks_with_the_end_token_and_markers_are_told_apart() -> None:
    prompts, tokenizer = builder()
    (row,) = training_rows(prompts, tokenizer, [Example("1", "What is 1 + 1?", reference="2")], 3)
    assert marked_text(row) == (
        "<|begin|><|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n\u27e62<|im_end|>\u27e7"
    )
    special = [piece.text for piece in row.pieces if piece.is_special]
    assert special == ["<|begin|><|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert [piece.is_learnt for piece in row.pieces if piece.is_special] == [False, False, False, True]
    assert row.learnt_tokens == 2


def test_a_turn_that_is_not_learnt_stands_outside_of_the_marks() -> None:
    prompts, tokenizer = builder()
    turns = (
        Message("user", "What is 2 + 2?"),
        Message("assistant", "5", is_learnt=False),
        Message("user", "Sure?"),
    )
    (row,) = training_rows(prompts, tokenizer, [Example("1", "Sure?", reference="4", messages=turns)], 1)
    assert "assistant\n5<|im_end|>" in marked_text(row)
    assert marked_text(row).endswith("\u27e64<|im_end|>\u27e7")


def test_with_prompts_learnt_too_all_is_between_marks_and_a_prompt_of_inference_has_none() -> None:
    prompts, tokenizer = builder(train_on_responses_only=False)
    (row,) = training_rows(prompts, tokenizer, [Example("1", "a", reference="b")], 1)
    assert marked_text(row).startswith("<|begin|>\u27e6<|im_start|>")
    (asked,) = inference_rows(prompts, tokenizer, [Example("1", "a", reference="b")], 1)
    assert "\u27e6" not in marked_text(asked)


def test_a_row_with_a_problem_is_told_and_control_characters_are_written_out() -> None:
    prompts, tokenizer = builder()
    rows = training_rows(prompts, tokenizer, [Example("1", "a", problem="the question is empty")], 1)
    assert rows[0].problem == "the question is empty"
    assert written_out("a\x1b[31m\x07\nb") == "a\\x1b[31m\\x07\nb"


def test_markdown_fences_rows_that_hold_a_fence_themselves() -> None:
    from tasks.core.prompts.preview import Preview

    prompts, tokenizer = builder()
    rows = training_rows(prompts, tokenizer, [Example("1", "`````x", reference="b")], 1)
    assert "``````text" in markdown([Preview("training", (("data", "d"),), rows)])


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> Path:
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "c.toml"
    path.write_text(
        f"""
        [fine_tuner]
        base_model_id = "{tiny_model_dir}"
        training_data_id = "{tmp_path / "rows.jsonl"}"
        system_prompt_override_text = "Be brief."
        [inferencer]
        testing_data_id = "{tmp_path / "rows.jsonl"}"
        [pipeline]
        models_dir = "{tmp_path / "models"}"
        """
    )
    return path


def test_the_command_shows_both_sections_without_colours_in_a_pipe(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["preview", str(config), "--rows", "2"])
    shown = capsys.readouterr().out
    assert "training" in shown and "inference" in shown and "\x1b" not in shown
    assert "system prompt: system_prompt_override_text: 'Be brief.'" in shown
    assert "an answer ends with: <|im_end|>" in shown
    assert shown.count("\u27e61<|im_end|>\u27e7") == shown.count("\u27e62<|im_end|>\u27e7") == 1
    assert "the one that fine-tuning" in shown
    assert "What stands between \u27e6 and \u27e7 is learnt." in shown


def test_a_section_without_data_is_left_out_and_none_at_all_is_refused(config: Path) -> None:
    from tasks.core.errors import ConfigError

    only = load_config(config, {"inferencer.testing_data_id": "null"})
    assert [found.name for found in preview(only, 1)] == ["training"]
    with pytest.raises(ConfigError, match="neither"):
        preview(
            load_config(
                config, {"inferencer.testing_data_id": "null", "fine_tuner.training_data_id": "null"}
            ),
            1,
        )


def test_what_prompts_do_with_thoughts_is_told(config: Path) -> None:
    settings = {"fine_tuner.chat_template": QWEN_3.template}
    found = preview(load_config(config, settings), 1)[0]
    facts = [text for label, text in found.facts if label == "thoughts"]
    assert facts[0] == "the prompt lets the model think"
    assert "rows without any are learnt behind a prompt that asks for none" in facts[1]
    assert "<think>\n\n</think>" in marked_text(found.rows[0]).partition("\u27e6")[0]


def test_inference_is_shown_as_the_model_asks_that_the_training_gives(config: Path) -> None:
    settings = {"fine_tuner.chat_template": QWEN_3.template}
    _, asked = preview(load_config(config, settings), 1)
    assert ("thoughts", "the prompt asks for answers without thoughts") in asked.facts
    assert marked_text(asked.rows[0]).endswith("<think>\n\n</think>\n\n")


def test_another_system_prompt_in_training_is_told(config: Path) -> None:
    _, asked = preview(load_config(config), 1)
    (warning,) = (text for label, text in asked.facts if label == "warning")
    assert "another system prompt" in warning
    same = {"inferencer.system_prompt_override_text": "Be brief."}
    _, asked = preview(load_config(config, same), 1)
    assert "warning" not in dict(asked.facts)


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    prompts, tokenizer = builder()
    (row,) = training_rows(prompts, tokenizer, [Example("1", "a", reference="\U0001f600\u5317")], 1)
    assert "\u27e6\U0001f600\u5317<|im_end|>\u27e7" in marked_text(row)
