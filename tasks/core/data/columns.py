"""From a dataset's columns to examples: which column is asked, which is the reference, and each row's id."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import orjson

from tasks.core.config.question_template import QuestionTemplate
from tasks.core.data.cell_texts import (
    NotTextError,
    clean_text,
    part_text,
    plain,
    reference_texts,
    scalar_text,
)
from tasks.core.data.cells import read_cells
from tasks.core.data.choosing import ColumnMapping, Columns, choose_columns
from tasks.core.data.conversations import read_answer, read_conversation, system_text, turns_of
from tasks.core.records import Example, Message

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ColumnMapping", "ContentCounts", "example_id", "examples"]

_log = logging.getLogger(__name__)

LARGEST_ROW_CHARACTERS = 8_000_000
"""Question, reference and all else of a row together: about two million tokens."""
MOST_TURNS = 10_000
_SHOWN_OF_LARGE = 1000
_BUT_THE_ID = attrgetter(*(field.name for field in fields(Example)[1:]))


def examples(
    rows: Dataset | Sequence[Mapping[str, Any]], mapping: ColumnMapping, *, told: bool = False
) -> Iterator[Example]:
    """One example a row, in the rows' order, read lazily; a row that cannot be asked carries its `problem`.

    The question column may hold text or a conversation (a list of turns, or one written as text). What is guessed
    where the default columns are not there, and what looks as if it were forgotten, is logged, unless the same rows
    were `told` of before. Raises DataError at once for a missing column.
    """
    columns = choose_columns(rows, mapping, level=logging.DEBUG if told else logging.WARNING)
    return _iterate(rows, columns, mapping.system_override, told=told)


class ContentCounts:
    """How often each content came; about 12 bytes a row, a tenth of what a dict would take."""

    def __init__(self) -> None:
        self._once: dict[int, array[int]] = {}  # hashes by their first 16 bits
        self._repeated: dict[int, int] = {}

    def add(self, key: int) -> int:
        """Count the 64-bit hash `key` and return how often it came before."""
        bucket = self._once.get(key >> 48)
        if bucket is None:
            self._once[key >> 48] = array("Q", [key])
        elif key in bucket:
            before = self._repeated.get(key, 1)
            self._repeated[key] = before + 1
            return before
        else:
            bucket.append(key)
        return 0


def example_id(example: Example, seen: ContentCounts) -> str:
    """16 hex digits of the content's sha256, then how often this content came before; `seen` is updated."""
    turns = [(turn.role, turn.content) for turn in example.messages or ()]
    content: list[Any] = [example.question, example.system, example.reference, turns, example.problem]
    # What few rows have is left out where it is not there, so that all others keep the ids they always had.
    if more := _rarer_content(example):
        content.append(more)
    digest = hashlib.sha256(orjson.dumps(content)).digest()[:8]
    return f"{digest.hex()}-{seen.add(int.from_bytes(digest, 'big'))}"


def _rarer_content(example: Example) -> dict[str, Any]:
    messages = example.messages or ()
    if not messages and not example.other_references and example.reference_reasoning is None:
        return {} if example.is_reference_learnt else {"reference not learnt": True}
    found: dict[str, Any] = {
        "other references": example.other_references,
        "reference reasoning": example.reference_reasoning,
        "reasoning": {str(place): turn.reasoning for place, turn in enumerate(messages) if turn.reasoning},
        "not learnt": [place for place, turn in enumerate(messages) if not turn.is_learnt],
        "reference not learnt": not example.is_reference_learnt,
    }
    return {name: value for name, value in found.items() if value}


# --- rows


def _iterate(
    rows: Dataset | Sequence[Mapping[str, Any]], columns: Columns, system_override: str | None, *, told: bool
) -> Iterator[Example]:
    seen = ContentCounts()
    order = [*columns.template.columns, columns.reference, columns.system, columns.reasoning]
    for *asked, answer, system, reasoning in read_cells(rows, order):
        if (size := _characters((*asked, answer, system, reasoning))) > LARGEST_ROW_CHARACTERS:
            example = _too_large(asked[0], size)
        else:
            question = asked[0] if columns.is_plain else _filled(columns.template, asked)
            example = _within_turns(_example(question, answer, system, reasoning, system_override))
        if example.other_references and not told:
            told = True
            _log.info(
                "Rows of the column %r have several right answers; the first is the reference, the others count too.",
                columns.reference,
            )
        yield _with_id(example, example_id(example, seen))


def _characters(value: Any) -> int:
    """Characters and bytes in a cell, whatever they are nested in."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def _too_large(asked: Any, size: int) -> Example:
    """A row that no model takes; only its beginning is kept, so that nothing behind it has to hold the whole."""
    start = _shown(asked[:_SHOWN_OF_LARGE]) if isinstance(asked, (str, bytes)) else ""
    return _unusable(
        f"{start}… ({size:,} characters)",
        None,
        _Answer(),
        f"the row has {size:,} characters, more than the {LARGEST_ROW_CHARACTERS:,} that a row may have",
    )


def _within_turns(example: Example) -> Example:
    turns = len(example.messages or ())
    if turns <= MOST_TURNS:
        return example
    problem = f"the conversation has {turns:,} turns, more than the {MOST_TURNS:,} that it may have"
    return _unusable(example.question, example.system, _Answer(), problem)


def _with_id(example: Example, row_id: str) -> Example:
    """The example under its id; `replace` would take several times as long."""
    return Example(row_id, *_BUT_THE_ID(example))


def _filled(template: QuestionTemplate, cells: Sequence[Any]) -> str:
    texts = {}
    for name, cell in zip(template.columns, cells, strict=True):
        try:
            texts[name] = part_text(cell)
        except NotTextError:
            texts[name] = ""
    return template.fill(texts)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a reference cell says; `turns` are there when it is a conversation of several."""

    texts: tuple[str, ...] = ()
    reasoning: str | None = None
    is_learnt: bool = True
    turns: Sequence[Any] = ()
    problem: str | None = None


def _read_reference(cell: Any) -> _Answer:
    turns = turns_of(cell)
    if turns is None:
        try:
            return _Answer(reference_texts(cell))
        except NotTextError as error:
            return _Answer(problem=f"the reference is {error}")
    if turns.problem is not None:
        return _Answer(problem=turns.problem)
    if len(turns.items) > 1:
        return _Answer(turns=turns.items)
    message = read_answer(turns.items[0])
    if isinstance(message, str):
        return _Answer(problem=f"the reference {message}")
    texts = (message.content,) if message.content.strip() else ()
    return _Answer(texts, message.reasoning, message.is_learnt)


def _example(asked: Any, answer: Any, system: Any, reasoning: Any, system_override: str | None) -> Example:
    reference = _read_reference(answer)
    try:
        own_system, asked = _system_text(system, system_override), _question_value(asked)
        thoughts = scalar_text(reasoning) if isinstance(reasoning, str) else None
    except NotTextError as error:
        return _unusable(asked, None, reference, str(error))
    if reference.problem is not None:
        return _unusable(asked, own_system, reference, reference.problem)
    if thoughts is not None and reference.texts:
        reference = replace(reference, reasoning=_bare(thoughts))
    turns = turns_of(asked)
    if reference.turns:
        asked, problem = _continued(asked, reference.turns)
        if problem is not None:
            return _unusable(asked, own_system, _Answer(), problem)
        turns, reference = turns_of(asked), _Answer(reasoning=_bare(thoughts) if thoughts else None)
    if turns is not None and turns.problem is not None:
        return _unusable(asked, own_system, reference, turns.problem)
    if turns is not None or isinstance(asked, (list, tuple)):
        items = asked if turns is None else turns.items
        return _from_conversation(items, reference, own_system, keep_system=system_override is None)
    if not isinstance(asked, str):
        what = "missing" if asked is None else f"not text but {_type_name(asked)}: {_shown(asked)[:80]}"
        return _unusable(asked, own_system, reference, f"the question is {what}")
    if not asked.strip():
        return _unusable(asked, own_system, reference, "the question is empty")
    return _with_reference(Example("", clean_text(asked), own_system), reference)


def _with_reference(example: Example, reference: _Answer) -> Example:
    if not reference.texts:
        return example
    first, *others = reference.texts
    thoughts, is_learnt = reference.reasoning, reference.is_learnt
    question, system, messages = example.question, example.system, example.messages
    return Example("", question, system, first, messages, None, thoughts, tuple(others), is_learnt)


def _unusable(asked: Any, system: str | None, reference: _Answer, problem: str) -> Example:
    return Example("", _shown(asked), system, next(iter(reference.texts), None), None, problem)


def _continued(asked: Any, answer: Sequence[Any]) -> tuple[Any, str | None]:
    """Question and reference as one conversation; or what keeps a reference of several turns from being one."""
    turns = turns_of(asked)
    before: list[Any] = [{"role": "user", "content": asked}] if turns is None else turns.items
    if isinstance(read_answer(answer[0]), Message):
        return [*before, *answer], None
    whole = read_conversation(answer)
    if whole.problem is not None:
        return asked, f"the reference: {whole.problem}"
    if read_conversation(before).question != whole.question:
        return asked, "the reference is a conversation about another question"
    return answer, None


def _from_conversation(
    turns: Sequence[Any], reference: _Answer, system: str | None, *, keep_system: bool
) -> Example:
    """`system` takes the place of the conversation's own; without it that one stays if `keep_system`."""
    conversation = read_conversation(turns)
    if conversation.problem is not None:
        return _unusable(turns, system, reference, conversation.problem)
    own = conversation.messages[0] if conversation.messages[0].role == "system" else None
    rest = conversation.messages if own is None else conversation.messages[1:]
    if system is None and keep_system and own is not None:
        system = own.content
    messages = rest if system is None else (Message("system", system), *rest)
    answer = conversation.answer
    if not reference.texts and answer is not None:
        reasoning = reference.reasoning or answer.reasoning
        reference = _Answer((answer.content,), reasoning, answer.is_learnt)
    return _with_reference(Example("", conversation.question, system, messages=messages), reference)


def _system_text(value: Any, override: str | None) -> str | None:
    if override is not None:
        return scalar_text(override)
    value = plain(value)
    if value is None or isinstance(value, (str, bytes)):
        written = system_text(value) if isinstance(value, str) else None
        return scalar_text(value if written is None else written)
    text = system_text(value)
    if text is None:
        raise NotTextError(f"the system prompt is not text but {_type_name(value)}")
    return scalar_text(text)


def _question_value(value: Any) -> Any:
    """Text that a table keeps as bytes is text."""
    value = plain(value)
    if not isinstance(value, (bytes, bytearray)):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _bare(thoughts: str) -> str:
    """Thoughts without the marks around them, which are the chat template's to write."""
    inner = thoughts.strip()
    if inner.startswith("<think>") and inner.endswith("</think>"):
        return inner.removeprefix("<think>").removesuffix("</think>").strip()
    return thoughts


def _shown(value: Any) -> str:
    """What an error row shows for a value that is not text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return clean_text(value)
    return clean_text(json.dumps(value, default=_as_text, ensure_ascii=False, separators=(",", ":")))


def _as_text(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, (bytes, bytearray)) else str(value)


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")
