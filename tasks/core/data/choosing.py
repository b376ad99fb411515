"""Which columns are read: those that a person names, else the usual ones, else a guess that leaves no doubt."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tasks.core.config.question_template import QuestionTemplate
from tasks.core.data.cells import read_cells
from tasks.core.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

DEFAULT_QUESTION_COLUMN = "question"
DEFAULT_REFERENCE_COLUMN = "answer"
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
_ASKED_AND_ANSWERED = (
    ("prompt", ("completion", "chosen", "response")),
    ("instruction", ("output", "response")),
)
# A column of such a name usually holds a part of what is asked.
_PARTS_OF_QUESTIONS = {
    *("input", "inputs", "context", "contexts", "passage", "passages", "paragraph", "paragraphs", "document"),
    *("documents", "article", "background", "evidence", "facts", "story", "table", "schema", "choices"),
    *("options", "system", "system_prompt", "tools", "functions", "image", "images"),
}


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """Names of the columns to read.

    `question` may be several columns, put below one another; `template` makes the question of columns in braces
    and takes its place. `system_override` takes the place of every row's system prompt. `reasoning` are the
    thoughts before the reference. A reference column that is not there is an error when a person named it, and a
    warning otherwise; `require_reference` tells which, and None takes every name but the default (`answer`) for a
    person's choice.
    """

    question: str | Sequence[str]
    reference: str | None = None
    system: str | None = None
    system_override: str | None = None
    require_reference: bool | None = None
    template: str | None = None
    reasoning: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, require_reference: bool | None = None) -> ColumnMapping:
        """The mapping that the keys of a section, or of an older manifest, describe."""
        return cls(
            question=settings["question_column"],
            reference=settings["ground_truth_column"],
            system=settings["system_prompt_column"],
            system_override=settings["system_prompt_override_text"],
            require_reference=require_reference,
            template=settings.get("question_template"),
            reasoning=settings.get("reasoning_column"),
        )


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that are read; where the question `is_plain`, it is the one column of `template` as it is."""

    template: QuestionTemplate
    is_plain: bool
    reference: str | None
    system: str | None
    reasoning: str | None

    @property
    def used(self) -> set[str]:
        """The names of all of them."""
        names = (*self.template.columns, self.reference, self.system, self.reasoning)
        return {name for name in names if name is not None}


def choose_columns(
    rows: Dataset | Sequence[Mapping[str, Any]], mapping: ColumnMapping, *, level: int
) -> Columns:
    """The columns to read of `rows`; guesses and forgotten columns are logged at `level`.

    Raises DataError for a column that is not there.
    """
    present = _column_names(rows)
    mapping, is_conversation = _guessed(present, mapping, level)
    template, key = _template(mapping)
    for name in template.columns:
        _require(present, name, key)
    system = mapping.system if mapping.system_override is None else None
    if system is not None:
        _require(present, system, "system_prompt_column")
    if mapping.reasoning is not None:
        _require(present, mapping.reasoning, "reasoning_column")
    is_plain = mapping.template is None and isinstance(mapping.question, str)
    reference = _reference_column(present, mapping, level, is_conversation=is_conversation)
    columns = Columns(template, is_plain, reference, system, mapping.reasoning)
    if _log.isEnabledFor(level):
        _tell_forgotten(rows, present, columns, mapping, level)
    return columns


def _column_names(rows: Dataset | Sequence[Mapping[str, Any]]) -> list[str]:
    names = getattr(rows, "column_names", None)
    if names is not None:
        return list(names)
    return list(dict.fromkeys(name for row in rows for name in row))


def _template(mapping: ColumnMapping) -> tuple[QuestionTemplate, str]:
    """What the question is made of, and the key that says so."""
    if mapping.template is not None:
        try:
            return QuestionTemplate.parse(mapping.template), "question_template"
        except ValueError as error:
            raise DataError(
                f"question_template {error}.", 'Write for example "{instruction}\\n\\n{input}".'
            ) from error
    names = (mapping.question,) if isinstance(mapping.question, str) else tuple(mapping.question)
    return QuestionTemplate.of_columns(names), "question_column"


def _guessed(present: Sequence[str], mapping: ColumnMapping, level: int) -> tuple[ColumnMapping, bool]:
    """The mapping for well-known names of columns, and whether the question is a column of conversations."""
    if mapping.template is not None or mapping.question != DEFAULT_QUESTION_COLUMN:
        return mapping, mapping.question in CONVERSATION_COLUMNS
    if DEFAULT_QUESTION_COLUMN in present:
        return _with_guessed_reference(present, mapping, ("answers",), level), False
    conversation = next((name for name in CONVERSATION_COLUMNS if name in present), None)
    if conversation is not None:
        _log.log(
            min(level, logging.INFO),
            "There is no column %r; the conversations in %r are asked.",
            mapping.question,
            conversation,
        )
        return replace(mapping, question=conversation), True
    found = [pair for pair in _ASKED_AND_ANSWERED if pair[0] in present]
    if not found and {"chosen", "rejected"} <= set(present):
        _log.log(level, "There is no column 'question'; the conversations in 'chosen' are asked.")
        return replace(mapping, question="chosen"), True
    if len(found) != 1:
        return mapping, False
    asked, answers = found[0]
    guessed = replace(mapping, question=asked)
    said = f"question_column = {asked!r}"
    if asked == "instruction" and "input" in present:
        guessed = replace(mapping, template="{instruction}\n\n{input}")
        said = f"question_template = {guessed.template!r}"
    _log.log(level, "There is no column 'question'; the question is taken from %s (%s).", asked, said)
    return _with_guessed_reference(present, guessed, answers, level), False


def _with_guessed_reference(
    present: Sequence[str], mapping: ColumnMapping, names: Iterable[str], level: int
) -> ColumnMapping:
    """The one of these columns that is there, where nobody named another one and the usual one is not there."""
    found = [name for name in names if name in present]
    is_default = mapping.reference == DEFAULT_REFERENCE_COLUMN and mapping.require_reference is not True
    if len(found) != 1 or not is_default or DEFAULT_REFERENCE_COLUMN in present:
        return mapping
    _log.log(
        level,
        "There is no column 'answer'; the reference answers are taken from %r (ground_truth_column = %r).",
        *(found[0], found[0]),
    )
    return replace(mapping, reference=found[0])


def _reference_column(
    present: Sequence[str], mapping: ColumnMapping, level: int, *, is_conversation: bool
) -> str | None:
    if mapping.reference is None or mapping.reference in present:
        return mapping.reference
    is_required = mapping.require_reference
    if is_required is None:
        is_required = mapping.reference != DEFAULT_REFERENCE_COLUMN
    if is_required:
        _require(present, mapping.reference, "ground_truth_column")
    if not is_conversation:
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
    step = f"Set {key} to one of these{guess}."
    if key == "question_template":
        step = f"Name one of these in {key}{guess.replace('to ', '')}."
    elif list(present) == ["text"]:
        step = "A single text has no question and no answer: split it into two columns, or into messages."
    raise DataError(f"The dataset has no column {name!r}; it has: {there}.", step)


def _tell_forgotten(
    rows: Dataset | Sequence[Mapping[str, Any]],
    present: Sequence[str],
    columns: Columns,
    mapping: ColumnMapping,
    level: int,
) -> None:
    for name in present:
        kind = name.strip().lower()
        if name in columns.used or kind not in _PARTS_OF_QUESTIONS:
            continue
        is_system = kind in ("system", "system_prompt")
        if (is_system and mapping.system_override is not None) or not _holds_something(rows, name):
            continue
        if is_system:
            step = f"set system_prompt_column = {name!r} to use it"
        elif kind in ("tools", "functions"):
            step = "tools are not supported yet"
        elif kind in ("image", "images"):
            step = "images are not supported"
        else:
            own = columns.template.text
            step = f"set question_template, for example {own + chr(10) * 2 + '{' + name + '}'!r}, to use it"
        _log.log(
            level,
            "The column %r is not used, though it looks as if it held a part of the question: %s.",
            *(name, step),
        )


def _holds_something(rows: Dataset | Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether any row has more than blank text there; ends at the first that has."""
    for (value,) in read_cells(rows, [name]):
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, (list, tuple, dict)) and not value:
            continue
        return True
    return False
