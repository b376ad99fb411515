"""Rows as datasets have them: conversations as text, prompt and completion, weights, thoughts, several columns."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tasks.core.config.question_template import QuestionTemplate
from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.errors import DataError
from tasks.core.records import Example, Message

DEFAULTS = ColumnMapping("question", "answer", require_reference=False)


def _all(rows: Sequence[dict[str, Any]], mapping: ColumnMapping = DEFAULTS) -> list[Example]:
    return list(examples(rows, mapping))


def _one(row: dict[str, Any], mapping: ColumnMapping = DEFAULTS) -> Example:
    return _all([row], mapping)[0]


def _turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = _turn("user", "What is 2+2?"), _turn("assistant", "4")


# --- conversations, in whatever form


@pytest.mark.parametrize(
    "cell",
    [
        [ASKED, ANSWERED],
        json.dumps([ASKED, ANSWERED]),
        json.dumps([ASKED, ANSWERED], indent=2),
        str([ASKED, ANSWERED]),
        json.dumps({"messages": [ASKED, ANSWERED]}),
        {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
        {"role": ["user", "assistant"], "content": ["What is 2+2?", "4"]},
        np.array([ASKED, ANSWERED], dtype=object),
    ],
)
def test_a_conversation_is_read_in_each_of_its_forms(cell: Any) -> None:
    example = _one({"messages": cell})
    assert (example.question, example.reference, example.problem) == ("What is 2+2?", "4", None)
    assert example.conversation == (Message("user", "What is 2+2?"),)


def test_a_conversation_that_is_cut_off_in_its_text_is_an_error_row() -> None:
    example = _one({"messages": json.dumps([ASKED, ANSWERED])[:-9]})
    assert example.problem == "the conversation is written as text that is not valid JSON"


@pytest.mark.parametrize(
    "text", ['[{"role": "admin"}] Who is it?', '["a"]', '{"role": 1}', "[1] role content"]
)
def test_a_question_that_holds_json_stays_a_question(text: str) -> None:
    example = _one({"question": text})
    assert (example.question, example.messages, example.problem) == (text, None, None)


@pytest.mark.parametrize("answers", ["completion", "chosen"])
def test_prompt_and_answer_may_be_lists_of_turns(answers: str) -> None:
    row = {"prompt": [ASKED], answers: [ANSWERED]}
    assert (_one(row).question, _one(row).reference) == ("What is 2+2?", "4")
    whole = {"prompt": "What is 2+2?", answers: [ASKED, ANSWERED]}
    assert (_one(whole).question, _one(whole).reference) == ("What is 2+2?", "4")
    as_text = {"prompt": "What is 2+2?", answers: json.dumps([ANSWERED])}
    assert (_one(as_text).question, _one(as_text).reference) == ("What is 2+2?", "4")


def test_a_completion_of_several_turns_goes_on_from_its_prompt() -> None:
    row = {"prompt": [ASKED], "completion": [ANSWERED, _turn("user", "Sure?"), _turn("assistant", "Yes.")]}
    example = _one(row)
    assert (example.question, example.reference) == ("Sure?", "Yes.")
    assert [turn.content for turn in example.conversation] == ["What is 2+2?", "4", "Sure?"]
    other = _one({"prompt": "Another one?", "chosen": [ASKED, ANSWERED]})
    assert other.problem == "the reference is a conversation about another question"


def test_a_system_prompt_may_be_a_turn() -> None:
    mapping = ColumnMapping("question", system="system")
    for system in ([_turn("system", "be brief")], json.dumps(_turn("system", "be brief")), "be brief"):
        assert _one({"question": "q", "system": system}, mapping).system == "be brief"


# --- tool calls

_CALL = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]


@pytest.mark.parametrize(
    "call",
    [
        _turn("assistant", "", tool_calls=_CALL),
        _turn("assistant", None, tool_calls=_CALL),
        _turn("assistant", " \n", function_call={"name": "weather"}),
        _turn("assistant", "Let me look.", tool_calls=json.dumps(_CALL)),
        _turn("assistant", [{"type": "tool_use", "name": "weather"}]),
        {"from": "function_call", "value": "weather()"},
        _turn("assistant", ""),  # the call is lost, its result follows
    ],
)
def test_a_tool_call_is_an_error_row_wherever_it_stands(call: dict[str, Any]) -> None:
    turns = [ASKED, call, _turn("tool", "18 C"), _turn("assistant", "It is 18 C.")]
    example = _one({"messages": turns})
    assert (
        example.problem == "turn 2 of the conversation is a tool call, and tool calls are not supported yet"
    )
    assert example.reference is None


def test_a_tool_call_as_reference_is_an_error_row() -> None:
    row = {"prompt": "Weather?", "completion": [_turn("assistant", "", tool_calls=_CALL)]}
    assert _one(row).problem == "the reference is a tool call, and tool calls are not supported yet"


def test_keys_of_tool_calls_that_a_table_fills_with_nothing_are_no_calls() -> None:
    empty = {"tool_calls": None, "function_call": {"name": None, "arguments": None}, "weight": None}
    assert _one({"messages": [{**ASKED, **empty}, {**ANSWERED, **empty, "tool_calls": []}]}).problem is None


def test_an_empty_answer_is_never_learnt() -> None:
    example = _one({"messages": [ASKED, _turn("assistant", " "), _turn("user", "Well?"), ANSWERED]})
    assert (example.problem, example.reference) == (None, "4")
    assert not example.conversation[1].is_learnt
    assert _one({"messages": [ASKED, _turn("assistant", "")]}).reference is None


# --- what is learnt, and thoughts


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"train_on_turn": False},
        {"training": "false"},
        {"loss": False},
        {"trainable": False},
        {"masked": True},
    ],
)
def test_a_turn_that_is_marked_is_not_learnt(mark: dict[str, Any]) -> None:
    turns = [
        ASKED,
        _turn("assistant", "5", **mark),
        _turn("user", "Sure?"),
        _turn("assistant", "No, 4.", weight=1),
    ]
    example = _one({"messages": turns})
    assert [turn.is_learnt for turn in example.conversation] == [True, False, True]
    assert example.is_reference_learnt
    last = _one({"messages": [ASKED, {**ANSWERED, **mark}]})
    assert (last.reference, last.is_reference_learnt) == ("4", False)
    assert last.id != _one({"messages": [ASKED, ANSWERED]}).id


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"weight": None}, {"train": True}, {"loss": 1}, {"masked": False}]
)
def test_a_turn_that_is_marked_as_learnt_or_not_at_all_is_learnt(mark: dict[str, Any]) -> None:
    assert _one({"messages": [ASKED, {**ANSWERED, **mark}]}) == _one({"messages": [ASKED, ANSWERED]})


@pytest.mark.parametrize(
    "turn",
    [
        _turn("assistant", "72", reasoning_content="so 72"),
        _turn("assistant", "72", reasoning="so 72", reasoning_content=None),
        _turn("assistant", "72", thinking="so 72"),
        _turn("assistant", "72", thoughts="so 72"),
        _turn("assistant", [{"type": "thinking", "thinking": "so 72"}, {"type": "text", "text": "72"}]),
        _turn("assistant", [{"type": "reasoning", "text": "so 72"}, {"type": "text", "text": "72"}]),
    ],
)
def test_thoughts_that_stand_apart_are_kept_apart(turn: dict[str, Any]) -> None:
    example = _one({"messages": [ASKED, turn]})
    assert (example.reference, example.reference_reasoning) == ("72", "so 72")
    later = _one({"messages": [ASKED, turn, _turn("user", "Sure?"), ANSWERED]})
    assert later.conversation[1] == Message("assistant", "72", "so 72")


def test_a_column_of_thoughts_goes_with_the_reference() -> None:
    mapping = ColumnMapping("question", "answer", reasoning="thoughts")
    row = {"question": "q", "answer": "72", "thoughts": "<think>\nso 72\n</think>"}
    example = _one(row, mapping)
    assert (example.reference, example.reference_reasoning) == ("72", "so 72")
    assert example.id != _one({**row, "thoughts": None}, mapping).id
    assert _one({**row, "thoughts": None}, mapping).id == _one(row).id
    with pytest.raises(DataError, match="Set reasoning_column"):
        _one({"question": "q", "answer": "a"}, mapping)


# --- questions of several columns


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [
        ("{instruction}\n\n{input}", "2 and 3", "Add.\n\n2 and 3"),
        ("{instruction}\n\n{input}", "", "Add."),
        ("{instruction}\n{input}", None, "Add."),
        ("{input}\n\n{instruction}", " ", "Add."),
        ("Task:\n{instruction}\n\nInput:\n{input}\n\nAnswer:", None, "Task:\nAdd.\n\nAnswer:"),
        ("{{json}} {instruction} {input}", "{x}", "{json} Add. {x}"),
        ("{instruction}\n\n{input}", ["a", 2], "Add.\n\na\n2"),
        ("{instruction}\n\n{input}", {"a": 1}, 'Add.\n\n{"a":1}'),
        ("{instruction}  \n\n\n{input}", "x", "Add.  \n\n\nx"),
    ],
)
def test_a_template_makes_one_question_of_columns(template: str, given: Any, expected: str) -> None:
    mapping = ColumnMapping("question", "output", template=template)
    example = _one({"instruction": "Add.", "input": given, "output": "5"}, mapping)
    assert (example.question, example.reference) == (expected, "5")


def test_columns_as_a_list_are_put_below_one_another() -> None:
    mapping = ColumnMapping(("instruction", "input"), "output")
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    assert _one(row, mapping) == _one(
        row, ColumnMapping("question", "output", template="{instruction}\n\n{input}")
    )
    assert _one({**row, "instruction": "", "input": None}, mapping).problem == "the question is empty"


@pytest.mark.parametrize("template", ["no column", "{a", "a}", "{} {a}"])
def test_a_template_that_makes_no_sense_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"single|without the name|names no column"):
        QuestionTemplate.parse(template)


def test_a_column_of_a_template_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"no column 'inptu'; it has: instruction, input") as caught:
        _all(
            [{"instruction": "a", "input": "b"}], ColumnMapping("question", template="{instruction} {inptu}")
        )
    assert "question_template" in str(caught.value)
    assert "'input'" in str(caught.value)


def test_a_forgotten_part_of_the_question_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    row = {
        "instruction": "Add.",
        "input": "2 and 3",
        "output": "5",
        "system": "s",
        "tools": "[]x",
        "context": " ",
    }
    mapping = ColumnMapping("instruction", "output")
    _all([row], mapping)
    told = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert [message.split("'")[1] for message in told] == ["input", "system", "tools"]
    assert "{instruction}" in told[0]
    caplog.clear()
    list(examples([row], mapping, told=True))
    _all(
        [row], ColumnMapping("question", "output", template="{instruction} {input} {tools}", system="system")
    )
    assert "not used" not in caplog.text


# --- guesses


@pytest.mark.parametrize(
    ("row", "question", "reference"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
        ({"prompt": "q", "answer": "a", "completion": "b"}, "q", "a"),
        ({"instruction": "q", "output": "a"}, "q", "a"),
        ({"instruction": "q", "input": "x", "output": "a"}, "q\n\nx", "a"),
        ({"question": "q", "answers": {"text": ["a"], "answer_start": [0]}}, "q", "a"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "What is 2+2?", "4"),
    ],
)
def test_well_known_columns_are_taken_and_told(
    row: dict[str, Any], question: str, reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        example = _one(row)
    assert (example.question, example.reference) == (question, reference)
    assert "There is no column" in caplog.text


@pytest.mark.parametrize(
    "row", [{"text": "all of it"}, {"prompt": "a", "instruction": "b"}, {"input": "a", "output": "b"}]
)
def test_columns_that_leave_a_doubt_are_listed_instead(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"no column 'question'; it has: {', '.join(row)}"):
        _all([row])


def test_a_reference_that_a_person_named_is_never_guessed() -> None:
    with pytest.raises(DataError, match="no column 'answer'"):
        _all(
            [{"prompt": "q", "completion": "a"}], ColumnMapping("question", "answer", require_reference=True)
        )
