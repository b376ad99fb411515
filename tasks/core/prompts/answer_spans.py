"""Which part of a conversation a model learns: each of the assistant's turns, behind the prompt that asks for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.core.errors import TemplateError
from tasks.core.prompts.chat_template import ChatTemplate, Rendered
from tasks.core.prompts.thinking import Thinking, written_with
from tasks.core.prompts.thoughts import split
from tasks.core.records import Message

_log = logging.getLogger(__name__)

_LEFT_OUT = "The chat template has no place for thoughts, or the prompt asks for none: the rows' reasoning is left out."


@dataclass(frozen=True, slots=True)
class AnsweredText:
    """One answer: the prompt that inference would use, and what the model writes behind it.

    `answer` ends with the token that ends the turn; `ends_turn` is false where the template writes none, so that
    an end token is still to be put there. `turn` is the answer's place among the turns.
    """

    prompt: Rendered
    answer: str
    ends_turn: bool
    turn: int
    has_thoughts: bool = False


class AnswerFinder:
    """Finds the assistant's turns through the chat template itself: what it adds to the prompt is the answer.

    Thoughts are part of what is learnt; without them the prompt is one that asks for none (see `thinking`).
    `question_part` and `answer_part` name the markers instead: all from an `answer_part` to the next
    `question_part` is then learnt.
    """

    def __init__(self, template: ChatTemplate, question_part: str | None, answer_part: str | None) -> None:
        self._template = template
        self._thinking = Thinking(template)
        self._question_part = question_part
        self._answer_part = answer_part
        self._ending = re.compile(rf"(?:{template.control_tokens.pattern})\s*\Z")
        self._said: set[str] = set()

    @property
    def thinking(self) -> Thinking:
        """What the template does with thoughts."""
        return self._thinking

    def render_all(
        self, turns: Sequence[Message], *, only: Sequence[Message] | None = None
    ) -> list[AnsweredText]:
        """The answers to learn, the last one first; with `only`, no others than these. Raises TemplateError."""
        wanted = [index for index, turn in enumerate(turns) if _is_answer(turns, index)]
        if only is not None:
            wanted = [index for index in wanted if any(turns[index] is turn for turn in only)]
        if self._answer_part is not None:
            return self._marked_answers(turns, wanted)
        return [self.render(turns[: index + 1]) for index in reversed(wanted)]

    def render(self, turns: Sequence[Message]) -> AnsweredText:
        """The last of `turns`, which is the assistant's. Raises TemplateError."""
        if self._answer_part is not None:
            return self._marked_answers(turns, [len(turns) - 1])[0]
        as_given, turns = turns[-1], [*turns[:-1], self._with_own_thoughts(turns[-1])]
        if turns[-1].reasoning is not None:
            thought = self._thought_through(turns, as_given)
            if thought is not None:
                return thought
            turns[-1] = replace(turns[-1], reasoning=None)
            self._say_once(_LEFT_OUT)
        template = self._thinking.closed
        prompt = template.render(turns[:-1], add_generation_prompt=True)
        full = template.render(turns, add_generation_prompt=False)
        body, end = self._ended(full.text, turns[-1])
        if body.startswith(prompt.text):
            answer = body[len(prompt.text) :]
        else:
            answer = _from_answer(body, turns[-1].content)
            if not self._thinking.may_think:
                self._say_once(
                    "The chat template writes a finished answer otherwise than it asks for one; "
                    "training puts the answer behind the prompt that inference uses."
                )
        return AnsweredText(prompt, answer + end, bool(end), len(turns) - 1)

    # --- thoughts

    def _with_own_thoughts(self, answer: Message) -> Message:
        """Thoughts that stand in the answer's text (`<think>…</think>4`) as its reasoning."""
        if answer.reasoning is not None:
            return answer if answer.reasoning.strip() else replace(answer, reasoning=None)
        parts = split(answer.content, self._thinking.markers)
        if parts.reasoning is None or parts.is_cut:
            return answer
        return replace(answer, content=parts.answer, reasoning=parts.reasoning)

    def _thought_through(self, turns: Sequence[Message], as_given: Message) -> AnsweredText | None:
        """The answer behind its thoughts, as the template writes them or as its markers ask for; None: neither."""
        template, answer = self._template, turns[-1]
        if self._thinking.is_closed:
            return None
        prompt = template.render(turns[:-1], add_generation_prompt=True)
        pair = self._thinking.simple_pair
        versions = [answer if template.thought_key is not None else as_given]
        if pair is not None:
            text = written_with(pair, answer.reasoning or "", answer.content)
            versions.append(Message("assistant", text))
        for version in versions:
            full = template.render([*turns[:-1], version], add_generation_prompt=False)
            body, end = self._ended(full.text, answer)
            learnt = body[len(prompt.text) :]
            if body.startswith(prompt.text) and (answer.reasoning or "").strip() in learnt:
                return AnsweredText(prompt, learnt + end, bool(end), len(turns) - 1, has_thoughts=True)
        if pair is None:
            return None
        full = template.render([*turns[:-1], replace(answer, reasoning=None)], add_generation_prompt=False)
        body, end = self._ended(full.text, answer)
        text = written_with(pair, answer.reasoning or "", _from_answer(body, answer.content))
        if self._thinking.is_open:
            text = text.removeprefix(f"{pair.opening}\n")
        return AnsweredText(prompt, text + end, bool(end), len(turns) - 1, has_thoughts=True)

    # --- where an answer ends

    def _ended(self, text: str, answer: Message) -> tuple[str, str]:
        """A finished conversation without what follows its last answer, and the end token with what precedes it."""
        tail = self._template.answer_tail
        if tail and text.endswith(tail):
            body, end = text[: -len(tail)], self._template.turn_end
            return body, "" if end is None else tail[: tail.index(end) + len(end)]
        found = self._ending.search(text)
        if found is not None and self._template.turn_end is not None:
            return text[: found.start()], found.group().rstrip()
        return (text.rstrip() if answer.content == answer.content.rstrip() else text), ""

    # --- markers that a person named

    def _marked_answers(self, turns: Sequence[Message], wanted: Sequence[int]) -> list[AnsweredText]:
        template, thinks = self._thinking.closed, False
        if turns[-1].reasoning is not None:
            thinks = self._template.thought_key is not None and not self._thinking.is_closed
            if thinks:
                template = self._template
            else:
                self._say_once(_LEFT_OUT)
                turns = [replace(turn, reasoning=None) for turn in turns]
        full = template.render(turns, add_generation_prompt=False)
        prompt = template.render(turns[:-1], add_generation_prompt=True)
        body, end = self._ended(full.text, turns[-1])
        text = body + end
        spans = self._marked_spans(text)
        start, stop = spans[-1]
        is_prefix = text.startswith(prompt.text)
        if is_prefix:
            spans[-1] = (max(start, len(prompt.text)), stop)
        places = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        if len(places) != len(spans):  # the marker is not that of each turn; nothing tells which is which
            places = [len(turns) - 1] * len(spans)
        found = []
        for place, (start, stop) in zip(places, spans, strict=True):
            is_last = (start, stop) == spans[-1]
            if place in wanted:
                before = Rendered(text[:start], full.is_marked) if is_prefix or not is_last else prompt
                ends_turn = bool(end) or not is_last
                found.append(AnsweredText(before, text[start:stop], ends_turn, place, thinks and is_last))
        return found[::-1]

    def _marked_spans(self, text: str) -> list[tuple[int, int]]:
        assert self._answer_part is not None
        spans, position = [], 0
        while (found := text.find(self._answer_part, position)) >= 0:
            start = found + len(self._answer_part)
            next_question = text.find(self._question_part, start) if self._question_part else -1
            position = len(text) if next_question < 0 else next_question
            turn = text[start:position]
            ending = self._ending.search(turn)
            end = start + (len(turn) if ending is None else ending.start() + len(ending.group().rstrip()))
            spans.append((start, end))
        if not spans or spans[-1][1] != len(text):
            raise TemplateError(
                f"The answer_part {self._answer_part!r} is not before the last answer in {text[-200:]!r}.",
                "Correct answer_part, or leave it out: the chat template then says what the answer is.",
            )
        return spans

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning(text)


def _is_answer(turns: Sequence[Message], index: int) -> bool:
    """Whether a turn is an answer to learn: the assistant's, with a question before it."""
    turn = turns[index]
    asked = any(before.role == "user" for before in turns[:index])
    return turn.role == "assistant" and turn.is_learnt and asked


def _from_answer(body: str, content: str) -> str:
    """The end of `body` from the answer on. Raises TemplateError where the template has left it out."""
    wanted = content.strip()
    position = len(body.rstrip()) - len(wanted)
    if not wanted or position < 0 or not body.startswith(wanted, position):
        raise TemplateError(
            "The chat template leaves out or rewrites the answer, so it cannot be learnt.",
            "Set question_part and answer_part, or use a model with another chat template.",
        )
    return body[position:]
