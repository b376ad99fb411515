"""The chat templates in wide use: what is asked, what is learnt, where an answer ends, in literal text."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest

from tasks.core.errors import ConfigError
from tasks.core.models.tokenizing import eos_token_ids
from tasks.core.prompts.chat_template import ChatTemplate, set_template
from tasks.core.prompts.tokens import PromptBuilder, TrainingRow
from tasks.core.records import Example, Message
from tests.making.chat_templates import (
    CASES,
    DEEPSEEK_R1,
    GPT_OSS,
    MISTRAL_NEMO,
    QWEN_3,
    TemplateCase,
    tokenizer_for,
)
from tests.making.rows import first_row

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
thinking_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.learns_thoughts is not None], ids=lambda case: case.name
)
plain_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.learns_thoughts is None], ids=lambda case: case.name
)
WHY = Example("id", "Why?", reference="So.")
WHY_WITH_THOUGHTS = Example("id", "Why?", reference="So.", reference_reasoning="Hm.")


def two_turns(first: str | None, last: str | None, system: str | None = None) -> Example:
    """A conversation of two answers, with thoughts or without."""
    asked = (Message("user", "One?"), Message("assistant", "Uno.", reasoning=first), Message("user", "Two?"))
    turns = asked if system is None else (Message("system", system), *asked)
    return Example("id", "Two?", system, "Dos.", turns, reference_reasoning=last)


def builder(tokenizer: Any, **options: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, max_sequence_length=500, **options)


def text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def learnt(tokenizer: Any, row: TrainingRow) -> str:
    assert row.problem is None, row.problem
    return text(tokenizer, [label for label in row.labels if label != -100])


def as_trained(tokenizer: Any, case: TemplateCase, *, thoughts: bool) -> Any:
    """The tokenizer that a model has which was trained on rows of one kind."""
    thinking = builder(tokenizer).thinking
    template = thinking.template if thoughts or not thinking.may_think else thinking.closed
    trained = copy.deepcopy(tokenizer)
    set_template(trained, template.keeping_variables().source)
    return trained


@every_case
def test_a_prompt_is_what_the_template_writes_with_one_bos(tiny_tokenizer: Any, case: TemplateCase) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    prompt = builder(tokenizer).build(WHY).token_ids
    with_system = builder(tokenizer).build(Example("id", "Why?", "Be brief.")).token_ids
    assert text(tokenizer, prompt) == case.asks
    assert text(tokenizer, with_system) == case.asks_system
    if case.bos is not None and case.name not in (
        "smollm 2",
        "gpt-oss",
    ):  # whose BOS the template does not use
        assert [ids.count(tokenizer.bos_token_id) for ids in (prompt, with_system)] == [1, 1]
        assert prompt[0] == with_system[0] == tokenizer.bos_token_id


@every_case
def test_an_answer_is_learnt_with_its_end_and_without_thoughts_of_nothing(
    tiny_tokenizer: Any, case: TemplateCase
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    (row,) = builder(tokenizer).training_rows([WHY])
    assert learnt(tokenizer, row) == case.learns
    assert text(tokenizer, row.input_ids) == (case.asks_closed or case.asks) + case.learns
    assert not row.has_thoughts


@thinking_cases
def test_thoughts_are_learnt_where_the_template_has_a_place_for_them(
    tiny_tokenizer: Any, case: TemplateCase
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    (row,) = builder(tokenizer).training_rows([WHY_WITH_THOUGHTS])
    assert learnt(tokenizer, row) == case.learns_thoughts
    assert text(tokenizer, row.input_ids) == case.asks + (case.learns_thoughts or "")
    assert row.has_thoughts


@plain_cases
def test_thoughts_are_left_out_and_said_so_where_it_has_none(
    tiny_tokenizer: Any, case: TemplateCase, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    rows = list(builder(tokenizer).training_rows([WHY_WITH_THOUGHTS] * 3))
    assert [learnt(tokenizer, row) for row in rows] == [case.learns] * 3
    assert caplog.text.count("reasoning is left out") == 1


@every_case
@pytest.mark.parametrize("thoughts", [False, True], ids=["answers", "thoughts"])
def test_the_trained_model_is_asked_as_it_was_trained_token_for_token(
    tiny_tokenizer: Any, case: TemplateCase, thoughts: bool
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    trained = builder(as_trained(tokenizer, case, thoughts=thoughts and case.learns_thoughts is not None))
    for system in (None, "Be brief.", "Be brief.\n\n"):
        for question in ("Why?", "Why?\n\n", "\n\nWhy? "):
            example = Example("id", question, system, "So.", reference_reasoning="Hm." if thoughts else None)
            (row,) = builder(tokenizer).training_rows([example])
            prompt = trained.build(example).token_ids
            assert row.input_ids[: len(prompt)] == prompt
            assert set(row.labels[: len(prompt)]) == {-100}
            assert row.labels[len(prompt) :] == row.input_ids[len(prompt) :]


@every_case
def test_every_answer_of_a_conversation_is_learnt_once(tiny_tokenizer: Any, case: TemplateCase) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    rows = list(builder(tokenizer).training_rows([two_turns(None, None)]))
    assert tuple(learnt(tokenizer, row) for row in rows) == case.turns
    assert [row.is_earlier for row in rows] == [number > 0 for number in range(len(rows))]
    assert sum(row.answers for row in rows) == 2


@thinking_cases
def test_the_thoughts_of_every_turn_are_learnt_once(tiny_tokenizer: Any, case: TemplateCase) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    rows = list(builder(tokenizer).training_rows([two_turns("A.", "B.")]))
    assert tuple(learnt(tokenizer, row) for row in rows) == case.turns_thoughts


@every_case
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_answer_stands_behind_the_prompt_that_asks_for_it(
    tiny_tokenizer: Any, case: TemplateCase, system: str | None
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    conversation = two_turns(None, None, system)
    trained = builder(as_trained(tokenizer, case, thoughts=False))
    rows = list(builder(tokenizer).training_rows([conversation]))
    first = () if system is None else (Message("system", system),)
    asked = [
        trained.build(conversation),
        trained.build(Example("id", "One?", system, messages=(*first, Message("user", "One?")))),
    ]
    for prompt in asked:
        (row,) = [
            row
            for row in rows
            if row.input_ids[: len(prompt.token_ids)] == prompt.token_ids
            and row.labels[len(prompt.token_ids)] != -100
        ]
        assert row.labels[len(prompt.token_ids) - 1] == -100


def test_a_system_prompt_in_the_last_question_makes_rows_of_the_earlier_answers(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, MISTRAL_NEMO)
    rows = list(builder(tokenizer).training_rows([two_turns(None, None, "Be brief.")]))
    assert [text(tokenizer, row.input_ids) for row in rows] == [
        "<s>[INST]One?[/INST]Uno.</s>[INST]Be brief.\n\nTwo?[/INST]Dos.</s>",
        "<s>[INST]Be brief.\n\nOne?[/INST]Uno.</s>",
    ]
    assert [learnt(tokenizer, row) for row in rows] == ["Dos.</s>", "Uno.</s>"]


@every_case
def test_the_token_that_closes_a_turn_ends_generation(
    tiny_tokenizer: Any, tiny_model: Any, case: TemplateCase
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    model = copy.copy(tiny_model)
    model.generation_config = copy.deepcopy(tiny_model.generation_config)
    model.generation_config.eos_token_id = None
    ends = tokenizer.convert_ids_to_tokens(list(eos_token_ids(model, tokenizer)))
    assert ends == list(dict.fromkeys(token for token in (case.eos, case.end) if token is not None))
    assert ChatTemplate(tokenizer).turn_end == case.end


@pytest.mark.parametrize("case", [QWEN_3, DEEPSEEK_R1], ids=lambda case: case.name)
def test_markers_named_by_hand_learn_no_empty_thoughts_either(
    tiny_tokenizer: Any, case: TemplateCase
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    parts = {"question_part": "<|im_start|>user", "answer_part": "<|im_start|>assistant\n"}
    if case is DEEPSEEK_R1:
        parts = {"question_part": "<\uff5cUser\uff5c>", "answer_part": "<\uff5cAssistant\uff5c>"}
    named = builder(tokenizer, **parts)
    row = first_row(named, WHY)
    assert text(tokenizer, row.input_ids) == (case.asks_closed or "") + case.learns
    assert learnt(tokenizer, row) == case.learns
    row = first_row(named, WHY_WITH_THOUGHTS)
    assert learnt(tokenizer, row) == (case.learns_thoughts if case is QWEN_3 else case.learns)


# --- thoughts in the answer's text, switches, variables


@thinking_cases
def test_thoughts_in_the_answers_text_are_learnt_like_those_apart(
    tiny_tokenizer: Any, case: TemplateCase
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    if case is GPT_OSS:
        pytest.skip("its thoughts are a message of their own, never text of the answer")
    inline = Example("id", "Why?", reference="<think>\nHm.\n</think>\n\nSo.")
    (row,) = builder(tokenizer).training_rows([inline])
    assert learnt(tokenizer, row) == case.learns_thoughts


def test_with_thinking_switched_off_thoughts_are_left_out(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    off = builder(tokenizer, chat_template_kwargs={"enable_thinking": False})
    (row,) = off.training_rows([WHY_WITH_THOUGHTS])
    assert text(tokenizer, row.input_ids) == (QWEN_3.asks_closed or "") + QWEN_3.learns
    assert "reasoning is left out" in caplog.text


def test_with_thinking_switched_on_by_hand_the_empty_block_still_belongs_to_the_prompt(
    tiny_tokenizer: Any,
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    on = builder(tokenizer, chat_template_kwargs={"enable_thinking": True})
    (row,) = on.training_rows([WHY])
    assert (learnt(tokenizer, row), on.thinking.is_closed) == (QWEN_3.learns, False)


def test_variables_kept_in_a_template_are_its_defaults_and_can_be_overruled(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    kept = ChatTemplate(tokenizer, {"enable_thinking": False}).keeping_variables()
    set_template(tokenizer, kept.source)
    assert text(tokenizer, builder(tokenizer).build(WHY).token_ids) == QWEN_3.asks_closed
    overruled = builder(tokenizer, chat_template_kwargs={"enable_thinking": True}).build(WHY)
    assert text(tokenizer, overruled.token_ids) == QWEN_3.asks
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
    )
    assert plain == QWEN_3.asks_closed


@pytest.mark.parametrize("case", [QWEN_3, DEEPSEEK_R1, GPT_OSS], ids=lambda case: case.name)
def test_transformers_alone_asks_the_trained_model_in_the_same_words(
    tiny_tokenizer: Any, case: TemplateCase
) -> None:
    trained = as_trained(tokenizer_for(tiny_tokenizer, case), case, thoughts=False)
    turns = [{"role": "user", "content": "Why?"}]
    asked = trained.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert asked == case.asks_closed
    answered = trained.apply_chat_template([*turns, {"role": "assistant", "content": "So."}], tokenize=False)
    assert answered.count("So.") == 1


def test_a_date_that_was_trained_with_is_the_date_of_inference(tiny_tokenizer: Any) -> None:
    dated = QWEN_3.template.replace("{% for m", "{{ date_string }}{% for m", 1)
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    set_template(tokenizer, dated)
    asked = builder(tokenizer, chat_template_kwargs={"date_string": "1 May 1900"}).build(WHY)
    kept = ChatTemplate(tokenizer, {"date_string": "1 May 1900"}).keeping_variables()
    assert "26 Jul 2024" in text(tokenizer, builder(tokenizer).build(WHY).token_ids)
    set_template(tokenizer, kept.source)
    assert "1 May 1900" in text(tokenizer, asked.token_ids)
    assert builder(tokenizer).build(WHY) == asked


@pytest.mark.parametrize(
    ("switch", "off"),
    [
        ("thinking", "thinking is false"),
        ("no_think", "no_think"),
        ("enable_reasoning", "not enable_reasoning"),
    ],
)
def test_the_switch_of_a_template_is_found_by_trying(tiny_tokenizer: Any, switch: str, off: str) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    start = "{% if enable_reasoning is not defined %}{% set enable_reasoning = true %}{% endif %}"
    set_template(
        tokenizer,
        start + QWEN_3.template.replace("enable_thinking is defined and enable_thinking is false", off),
    )
    closed = builder(tokenizer).thinking.closed
    assert closed.source.startswith("{%- if " + switch + " is not defined %}")
    assert closed.generation_prompt.endswith("assistant\n<think>\n\n</think>\n\n")


def test_variables_that_are_not_the_templates_are_refused_or_told(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    for name in ("messages", "add_generation_prompt", "tokenize", "return_dict"):
        with pytest.raises(ConfigError, match=f"chat_template_kwargs sets {name}"):
            builder(tokenizer, chat_template_kwargs={name: True})
    builder(tokenizer, chat_template_kwargs={"enable_thinkin": False})
    assert "reads no variable enable_thinkin of chat_template_kwargs" in caplog.text


@pytest.mark.parametrize("value", [True, None, 3, "a 'quote' \"\\n", [1, "b"], {"a": [False]}])
def test_values_of_every_kind_survive_being_written_into_a_template(tiny_tokenizer: Any, value: Any) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    set_template(
        tokenizer,
        "{% macro show() %}{{ given | tojson }}{% endmacro %}{{ messages[-1].content }}{{ show() }}",
    )
    asked = builder(tokenizer, chat_template_kwargs={"given": value}).build(WHY)
    set_template(tokenizer, ChatTemplate(tokenizer, {"given": value}).keeping_variables().source)
    assert builder(tokenizer).build(WHY) == asked
    assert text(tokenizer, asked.token_ids) == "Why?" + json.dumps(value, ensure_ascii=False)
