"""Every row becomes one example with a lasting id; a row that cannot be asked keeps its reason."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.data.columns import ColumnMapping, ContentCounts, examples
from tasks.core.errors import DataError
from tasks.core.records import Example, Message
from tasks.core.runs.rows import index_rows

MAPPING = ColumnMapping("question", "answer")


def _examples(rows: Sequence[dict[str, Any]], mapping: ColumnMapping = MAPPING) -> list[Example]:
    return list(examples(rows, mapping))


def _one(row: dict[str, Any], mapping: ColumnMapping = MAPPING) -> Example:
    (example,) = _examples([row], mapping)
    return example


def test_a_row_becomes_question_and_reference() -> None:
    example = _one({"question": "What is 2 + 2?", "answer": "4", "other": 1})
    assert (example.question, example.reference, example.system, example.problem) == (
        "What is 2 + 2?",
        "4",
        None,
        None,
    )


def test_a_dataset_and_a_list_give_the_same_examples() -> None:
    from datasets import Dataset

    rows = [{"question": f"q{n % 3}", "answer": str(n), "system": "be brief"} for n in range(2500)]
    mapping = ColumnMapping("question", "answer", system="system")
    assert list(examples(Dataset.from_list(rows), mapping)) == _examples(rows, mapping)


def test_examples_are_read_lazily() -> None:
    class Rows(list[dict[str, Any]]):
        column_names = ("question",)
        read = 0

        def __iter__(self) -> Any:
            for row in list.__iter__(self):
                self.read += 1
                yield row

    rows = Rows([{"question": "a"}] * 100)
    next(examples(rows, ColumnMapping("question")))
    assert rows.read == 1


# --- ids

rows_of_few_values = st.lists(
    st.fixed_dictionaries(
        {"question": st.sampled_from(["a", "b", "", 3, None]), "answer": st.sampled_from(["x", "y"])}
    ),
    min_size=1,
    max_size=20,
)


@given(rows=rows_of_few_values, data=st.data())
def test_reordering_rows_keeps_the_set_of_ids(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    assert {example.id for example in _examples(rows)} == {example.id for example in _examples(shuffled)}


@given(rows=rows_of_few_values)
def test_ids_are_unique_and_equal_content_differs_only_in_its_occurrence(rows: list[dict[str, Any]]) -> None:
    found = _examples(rows)
    assert len({example.id for example in found}) == len(rows)
    contents = {
        (repr(row["question"]), row["answer"]): example.id[:16]
        for row, example in zip(rows, found, strict=True)
    }
    assert all(
        contents[repr(row["question"]), row["answer"]] == example.id[:16]
        for row, example in zip(rows, found, strict=True)
    )
    assert len(set(contents.values())) == len(contents)


def test_equal_rows_are_counted() -> None:
    ids = [example.id for example in _examples([{"question": "a", "answer": "b"}] * 3)]
    assert [row_id[16:] for row_id in ids] == ["-0", "-1", "-2"]


@pytest.mark.parametrize(
    "other",
    [
        {"question": "q2", "answer": "a", "system": "s"},
        {"question": "q", "answer": "a2", "system": "s"},
        {"question": "q", "answer": "a", "system": "s2"},
        {"question": "q", "answer": None, "system": "s"},
    ],
)
def test_the_id_depends_on_question_reference_and_system(other: dict[str, Any]) -> None:
    mapping = ColumnMapping("question", "answer", system="system")
    assert _one({"question": "q", "answer": "a", "system": "s"}, mapping).id != _one(other, mapping).id


def test_the_id_depends_on_earlier_turns() -> None:
    def row(first: str) -> dict[str, Any]:
        turns = [("user", first), ("assistant", "ok"), ("user", "q")]
        return {"question": [{"role": role, "content": content} for role, content in turns]}

    assert _one(row("a"), ColumnMapping("question")).id != _one(row("b"), ColumnMapping("question")).id


def test_an_id_does_not_change_between_versions_of_this_project() -> None:
    assert _one({"question": "What is 2 + 2?", "answer": "4"}).id == "bc937b770dcf1b03-0"


def test_the_fingerprint_sees_content_and_order() -> None:
    a, b, c = ({"question": name, "answer": "x"} for name in "abc")

    def fingerprint(*rows: dict[str, Any]) -> str:
        return index_rows(lambda: _examples(rows)).rows_sha256

    assert fingerprint(a, b) == fingerprint(a, b)
    assert (
        len({fingerprint(a, b), fingerprint(b, a), fingerprint(a, c), fingerprint(a), fingerprint(a, a)}) == 5
    )


# --- columns


def test_a_missing_column_error_lists_the_columns_there_are() -> None:
    with pytest.raises(DataError, match=r"no column 'Question'; it has: question, answer") as caught:
        examples([{"question": "a", "answer": "b"}], ColumnMapping("Question"))
    assert "perhaps to 'question'" in str(caught.value)


def test_a_missing_reference_column_is_an_error_when_a_person_named_it() -> None:
    with pytest.raises(DataError, match="no column 'solution'"):
        examples([{"question": "a"}], ColumnMapping("question", "solution"))
    with pytest.raises(DataError, match="no column 'answer'"):
        examples([{"question": "a"}], ColumnMapping("question", "answer", require_reference=True))


@pytest.mark.parametrize(
    "mapping",
    [ColumnMapping("question", "answer"), ColumnMapping("question", "answer", require_reference=False)],
)
def test_a_missing_default_reference_column_is_a_warning(
    mapping: ColumnMapping, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        example = _one({"question": "a"}, mapping)
    assert example.reference is None
    assert "no column 'answer'" in caplog.text


def test_the_system_override_beats_the_column() -> None:
    row = {"question": "a", "system": "from the column"}
    assert _one(row, ColumnMapping("question", system="system")).system == "from the column"
    assert _one(row, ColumnMapping("question", system="system", system_override="mine")).system == "mine"
    assert _one(row, ColumnMapping("question", system="system", system_override=" ")).system is None
    assert _one(row, ColumnMapping("question", system="not there", system_override="mine")).system == "mine"


@pytest.mark.parametrize("system", ["", "  ", None])
def test_a_blank_system_prompt_is_none(system: str | None) -> None:
    assert (
        _one({"question": "a", "system": system}, ColumnMapping("question", system="system")).system is None
    )


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ("4", "4"),
        (4, "4"),
        (4.5, "4.5"),
        ("", None),
        (" ", None),
        (None, None),
        (["a", "b"], "a"),
        ([], None),
        ({"text": ["Paris", "paris"], "answer_start": [1, 2]}, "Paris"),
    ],
)
def test_references_of_common_shapes_are_read(value: Any, reference: str | None) -> None:
    assert _one({"question": "a", "answer": value}).reference == reference


# --- rows that cannot be asked


@pytest.mark.parametrize(
    ("question", "shown", "problem"),
    [
        ("", "", "the question is empty"),
        (" \n\t", " \n\t", "the question is empty"),
        (None, "", "the question is missing"),
        (42, "42", "the question is not text but a number: 42"),
        (2**70, str(2**70), f"the question is not text but a number: {2**70}"),
        (True, "true", "the question is not text but true or false: true"),
        ({"a": 1}, '{"a":1}', 'the question is not text but an object: {"a":1}'),
    ],
)
def test_a_row_without_a_question_keeps_its_place_and_says_why(
    question: Any, shown: str, problem: str
) -> None:
    good = {"question": "a", "answer": "x"}
    found = _examples([good, {"question": question, "answer": "x"}, good])
    assert (found[1].question, found[1].problem) == (shown, problem)
    assert [example.problem for example in (found[0], found[2])] == [None, None]


def test_a_system_prompt_that_is_not_text_is_a_problem() -> None:
    example = _one({"question": "a", "system": 5}, ColumnMapping("question", system="system"))
    assert example.problem == "the system prompt is not text but a number"


@settings(deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
def test_no_value_of_any_kind_stops_the_reading(value: Any) -> None:
    example = _one(
        {"question": value, "answer": value, "system": value}, ColumnMapping("question", "answer", "system")
    )
    example.question.encode()
    assert example.problem or example.question.strip()


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert _one({"question": "a\ud83d", "answer": "b\ud83d"}).question == "a?"


# --- conversations


def _turns(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_conversation_asks_its_last_user_turn_and_refers_to_the_answer_that_follows() -> None:
    turns = _turns(("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))
    example = _one({"messages": turns}, ColumnMapping("question"))
    assert (example.question, example.reference, example.system) == ("u2", "a2", "s")
    assert example.conversation == (
        Message("system", "s"),
        Message("user", "u1"),
        Message("assistant", "a1"),
        Message("user", "u2"),
    )


def test_a_conversation_that_ends_with_a_question_has_no_reference() -> None:
    example = _one({"messages": _turns(("user", "u"))}, ColumnMapping("messages"))
    assert (example.question, example.reference, example.problem) == ("u", None, None)


def test_a_conversation_keeps_tool_turns_before_its_answer() -> None:
    turns = _turns(("user", "u"), ("assistant", "let me look"), ("tool", "42"), ("assistant", "it is 42"))
    example = _one({"messages": turns}, ColumnMapping("messages"))
    assert example.reference == "it is 42"
    assert [message.role for message in example.conversation] == ["user", "assistant", "tool"]


def test_sharegpt_turns_are_read() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    example = _one({"conversations": turns}, ColumnMapping("question"))
    assert (example.system, example.question, example.reference) == ("s", "u", "a")


def test_the_system_override_replaces_a_conversations_own_system_prompt() -> None:
    row = {"messages": _turns(("system", "theirs"), ("user", "u"))}
    example = _one(row, ColumnMapping("messages", system_override="mine"))
    assert example.conversation == (Message("system", "mine"), Message("user", "u"))
    without = _one(row, ColumnMapping("messages", system_override=""))
    assert (without.system, without.conversation) == (None, (Message("user", "u"),))


def test_a_reference_column_beats_the_conversations_last_turn() -> None:
    row = {"messages": _turns(("user", "u"), ("assistant", "a")), "answer": "b"}
    assert _one(row, ColumnMapping("messages", "answer")).reference == "b"


def test_text_parts_of_a_turn_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert _one({"messages": _turns(("user", parts))}, ColumnMapping("messages")).question == "one\ntwo"


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([], "the conversation has no user turn"),
        (_turns(("system", "s"), ("assistant", "a")), "the conversation has no user turn"),
        (_turns(("user", "u"), ("wizard", "w")), "turn 2 of the conversation has the unknown role 'wizard'"),
        (_turns(("user", None)), "turn 1 of the conversation has no text"),
        (_turns(("user", [{"type": "image"}])), "turn 1 of the conversation has no text"),
        (_turns(("user", " ")), "the last user turn of the conversation is empty"),
        (_turns(("user", "u"), ("system", "s")), "the conversation to answer ends with a turn of the system"),
        (["hello"], "turn 1 of the conversation is not an object but str"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [1]}],
            "is a tool call, and tool calls are not supported yet",
        ),
    ],
)
def test_a_malformed_conversation_says_what_is_wrong(turns: list[Any], problem: str) -> None:
    example = _one({"messages": turns}, ColumnMapping("messages"))
    assert example.problem is not None
    assert problem in example.problem


def test_conversations_in_a_file_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from tasks.core.data.sources import load_rows

    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chats.jsonl"
    chats = [_turns(("user", "u\u2028é"), ("assistant", "a")), "not a chat", _turns(("user", "last"))]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    found = list(examples(load_rows(str(path), split=None), ColumnMapping("question")))
    assert [example.question for example in found] == ["u\u2028é", "not a chat", "last"]


def test_gsm8k_has_no_problem_rows_and_unique_ids(shared_data_dir: Path) -> None:
    from tasks.core.data.sources import load_rows

    found = list(examples(load_rows(str(shared_data_dir / "gsm8k"), split="test"), MAPPING))
    assert len(found) == len({example.id for example in found}) == 1319
    assert not [example for example in found if example.problem or not example.reference]


def test_contents_are_counted_as_a_counter_would() -> None:
    source = random.Random(4)
    keys = [source.choice([source.getrandbits(64), source.randrange(40) << 45, 7]) for _ in range(3000)]
    counts, expected = ContentCounts(), Counter[int]()
    for key in keys:
        assert counts.add(key) == expected[key]
        expected[key] += 1
