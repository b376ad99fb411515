"""From a dataset's columns to examples: which column is asked, which is the reference, and each row's id."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import orjson

from tasks.core.data.conversations import clean_text, read_conversation
from tasks.core.errors import DataError
from tasks.core.records import Example, Message

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

DEFAULT_QUESTION_COLUMN = "question"
DEFAULT_REFERENCE_COLUMN = "answer"
CONVERSATION_COLUMNS = ("messages", "conversations")
_ROWS_PER_READ = 1000


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """Names of the columns to read.

    `system_override` takes the place of every row's system prompt. A reference column that is not there
    is an error when a person named it, and a warning otherwise; `require_reference` tells which, and
    None takes every name but the default (`answer`) for a person's choice.
    """

    question: str
    reference: str | None = None
    system: str | None = None
    system_override: str | None = None
    require_reference: bool | None = None


def examples(
    rows: Dataset | Sequence[Mapping[str, Any]], mapping: ColumnMapping, *, told: bool = False
) -> Iterator[Example]:
    """One example a row, in the rows' order, read lazily; a row that cannot be asked carries its `problem`.

    The question column may hold text or a conversation (a list of turns). Where the column `question`
    is not there, a column `messages` or `conversations` takes its place. The log says so, unless the
    same rows were `told` of before. Raises DataError at once for a missing column.
    """
    present = _column_names(rows)
    level = logging.DEBUG if told else logging.WARNING
    question = _question_column(present, mapping.question, level)
    reference = _reference_column(present, mapping, question, level)
    system = mapping.system if mapping.system_override is None else None
    if system is not None:
        _require(present, system, "system_prompt_column")
    return _iterate(rows, (question, reference, system), mapping.system_override)


def rows_sha256(examples: Iterable[Example]) -> str:
    """Fingerprint (hex) of what is asked, in the dataset's order; ids carry the content."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.id.encode() + b"\n")
    return digest.hexdigest()


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
    content = orjson.dumps([example.question, example.system, example.reference, turns, example.problem])
    digest = hashlib.sha256(content).digest()[:8]
    return f"{digest.hex()}-{seen.add(int.from_bytes(digest, 'big'))}"


# --- columns


def _column_names(rows: Dataset | Sequence[Mapping[str, Any]]) -> list[str]:
    names = getattr(rows, "column_names", None)
    if names is not None:
        return list(names)
    return list(dict.fromkeys(name for row in rows for name in row))


def _question_column(present: Sequence[str], wanted: str, level: int) -> str:
    if wanted not in present and wanted == DEFAULT_QUESTION_COLUMN:
        conversation = next((name for name in CONVERSATION_COLUMNS if name in present), None)
        if conversation is not None:
            _log.log(
                min(level, logging.INFO),
                "There is no column %r; the conversations in %r are asked.",
                wanted,
                conversation,
            )
            return conversation
    _require(present, wanted, "question_column")
    return wanted


def _reference_column(
    present: Sequence[str], mapping: ColumnMapping, question: str, level: int
) -> str | None:
    if mapping.reference is None or mapping.reference in present:
        return mapping.reference
    is_required = mapping.require_reference
    if is_required is None:
        is_required = mapping.reference != DEFAULT_REFERENCE_COLUMN
    if is_required:
        _require(present, mapping.reference, "ground_truth_column")
    if question not in CONVERSATION_COLUMNS:
        _log.log(
            level,
            "There is no column %r, so the rows have no reference answers; there are: %s.",
            mapping.reference,
            ", ".join(present),
        )
    return None


def _require(present: Sequence[str], name: str, key: str) -> None:
    if name in present:
        return
    near = get_close_matches(name, present, n=1, cutoff=0.5)
    guess = f", perhaps to {near[0]!r}" if near else ""
    there = ", ".join(present) or "none"
    raise DataError(
        f"The dataset has no column {name!r}; it has: {there}.", f"Set {key} to one of these{guess}."
    )


# --- rows


def _iterate(
    rows: Dataset | Sequence[Mapping[str, Any]],
    columns: tuple[str, str | None, str | None],
    system_override: str | None,
) -> Iterator[Example]:
    seen = ContentCounts()
    wanted = [name for name in columns if name is not None]
    for asked, answer, system in _cells(rows, wanted, columns):
        example = _example(asked, answer, system, system_override)
        yield _with_id(example, example_id(example, seen))


def _with_id(example: Example, row_id: str) -> Example:
    return Example(
        row_id, example.question, example.system, example.reference, example.messages, example.problem
    )


def _cells(
    rows: Dataset | Sequence[Mapping[str, Any]], wanted: Sequence[str], order: Sequence[str | None]
) -> Iterator[tuple[Any, ...]]:
    """The wanted columns' values of each row; other columns are not decoded."""
    if hasattr(rows, "select_columns"):
        narrow = rows.select_columns(list(dict.fromkeys(wanted)))
        for batch in narrow.with_format(None).iter(batch_size=_ROWS_PER_READ):
            length = len(batch[wanted[0]])
            columns = [batch[name] if name is not None else [None] * length for name in order]
            yield from zip(*columns, strict=True)
    else:
        for row in rows:
            yield tuple(row.get(name) if name is not None else None for name in order)


def _example(asked: Any, answer: Any, system: Any, system_override: str | None) -> Example:
    reference, system_text = _reference_text(answer), _text_or_none(system)
    if system_override is not None:
        system_text = _text_or_none(system_override)
    elif system is not None and not isinstance(system, str):
        problem = f"the system prompt is not text but {_type_name(system)}"
        return Example("", _shown(asked), None, reference, None, problem)
    if isinstance(asked, (list, tuple)):
        return _from_conversation(asked, reference, system_text, keep_system=system_override is None)
    if not isinstance(asked, str):
        what = "missing" if asked is None else f"not text but {_type_name(asked)}: {_shown(asked)[:80]}"
        return Example("", _shown(asked), system_text, reference, None, f"the question is {what}")
    if not asked.strip():
        return Example("", asked, system_text, reference, None, "the question is empty")
    return Example("", clean_text(asked), system_text, reference)


def _from_conversation(
    turns: Sequence[Any], reference: str | None, system: str | None, *, keep_system: bool
) -> Example:
    """`system` takes the place of the conversation's own; without it that one stays if `keep_system`."""
    conversation = read_conversation(turns)
    if conversation.problem is not None:
        return Example("", _shown(turns), system, reference, None, conversation.problem)
    own = conversation.messages[0] if conversation.messages[0].role == "system" else None
    rest = conversation.messages if own is None else conversation.messages[1:]
    if system is None and keep_system and own is not None:
        system = own.content
    messages = rest if system is None else (Message("system", system), *rest)
    answer = conversation.answer if reference is None else reference
    return Example("", conversation.question, system, answer, messages)


def _text_or_none(value: Any) -> str | None:
    return clean_text(value) if isinstance(value, str) and value.strip() else None


def _reference_text(value: Any) -> str | None:
    """Blank means that there is no reference; a number is its text, a list its first text (SQuAD's answers)."""
    if isinstance(value, dict) and isinstance(value.get("text"), (list, str)):
        value = value["text"]
    if isinstance(value, (list, tuple)):
        value = next(iter(value), None)
    if isinstance(value, (bool, int, float)):
        return str(value)
    return _text_or_none(value)


def _shown(value: Any) -> str:
    """What an error row shows for a value that is not text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return clean_text(value)
    return clean_text(json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":")))


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")
