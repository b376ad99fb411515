"""Which part of a rendered conversation a model learns: the assistant's turns with their end tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.core.data.chat_template import ChatTemplate, Rendered
from tasks.core.errors import TemplateError
from tasks.core.records import Message

_log = logging.getLogger(__name__)

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class AnsweredText:
    """A conversation that ends with an answer. `spans` are the character ranges of the assistant's turns.

    `ends_turn` is false where the template writes nothing that ends the last answer.
    """

    rendered: Rendered
    spans: tuple[Span, ...]
    ends_turn: bool


class AnswerFinder:
    """Finds the assistant's turns through the chat template itself: what it adds to the prompt is the answer.

    `question_part` and `answer_part` name the markers instead: all from an `answer_part` to the next
    `question_part` is then learnt.
    """

    def __init__(self, template: ChatTemplate, question_part: str | None, answer_part: str | None) -> None:
        self._template = template
        self._question_part = question_part
        self._answer_part = answer_part
        self._ending = re.compile(rf"(?:{template.control_tokens.pattern})\s*\Z")
        self._said: set[str] = set()

    def render(self, turns: Sequence[Message]) -> AnsweredText:
        """Render `turns`, of which the last is the assistant's. Raises TemplateError."""
        full = self._template.render(turns, add_generation_prompt=False)
        if self._answer_part is not None:
            return self._with_end(full, self._marked_spans(full.text), turns[-1])
        text, last_span = self._last_answer(full.text, turns)
        spans = [*self._earlier_answers(text, turns), last_span]
        return self._with_end(Rendered(text, full.is_marked), spans, turns[-1])

    def _last_answer(self, text: str, turns: Sequence[Message]) -> tuple[str, Span]:
        """The text, and the range that the template added to the prompt which inference would use."""
        prompt = self._template.render(turns[:-1], add_generation_prompt=True).text
        if not text.startswith(prompt):
            content = turns[-1].content.strip()
            position = text.rfind(content)
            if position < 0:
                raise TemplateError(
                    "The chat template leaves out or rewrites the answer, so it cannot be learnt.",
                    "Set question_part and answer_part, or use a model with another chat template.",
                )
            self._say_once(
                "The chat template writes a finished answer otherwise than it asks for one; "
                "training puts the answer behind the prompt that inference uses."
            )
            text = prompt + text[position:]
        return text, (len(prompt), len(text))

    def _earlier_answers(self, text: str, turns: Sequence[Message]) -> list[Span]:
        spans = []
        for index, turn in enumerate(turns[:-1]):
            if turn.role != "assistant" or not any(before.role == "user" for before in turns[:index]):
                continue
            prompt = self._template.render(turns[:index], add_generation_prompt=True).text
            through = self._template.render(turns[: index + 1], add_generation_prompt=False).text
            if text.startswith(through) and through.startswith(prompt):
                end = self._ending.search(through)
                spans.append((len(prompt), _end_without_space(through, end)))
            else:
                self._say_once("The chat template rewrites earlier turns; only the last answers are learnt.")
        return spans

    def _marked_spans(self, text: str) -> list[Span]:
        assert self._answer_part is not None
        spans, position = [], 0
        while (found := text.find(self._answer_part, position)) >= 0:
            start = found + len(self._answer_part)
            next_question = text.find(self._question_part, start) if self._question_part else -1
            position = len(text) if next_question < 0 else next_question
            turn = text[start:position]
            end = start + _end_without_space(turn, self._ending.search(turn))
            spans.append((start, len(text) if position == len(text) else end))
        if not spans or spans[-1][1] != len(text):
            raise TemplateError(
                f"The answer_part {self._answer_part!r} is not before the last answer in {text[-200:]!r}.",
                "Correct answer_part, or leave it out: the chat template then says what the answer is.",
            )
        return spans

    def _with_end(self, rendered: Rendered, spans: Sequence[Span], answer: Message) -> AnsweredText:
        """Let the text end with the last answer's end token; line breaks that follow it are never generated."""
        start, end = spans[-1]
        found = self._ending.search(rendered.text, start, end)
        if found is None and answer.content == answer.content.rstrip():
            end = start + len(rendered.text[start:end].rstrip())
        elif found is not None:
            end = _end_without_space(rendered.text, found)
        text = Rendered(rendered.text[:end], rendered.is_marked)
        return AnsweredText(text, (*spans[:-1], (start, end)), found is not None)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning(text)


def _end_without_space(text: str, ending: re.Match[str] | None) -> int:
    """Where the end token ends, without the white space behind it; the text's end if there is no such token."""
    if ending is None:
        return len(text)
    return ending.start() + len(ending.group().rstrip())
