"""Conversations in a dataset's cell: OpenAI's messages (role, content) and ShareGPT's (from, value)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.core.records import Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to answer. `question` is the last user turn, `answer` the assistant turn at the end.

    `messages` is all before that answer. `problem` says why the turns cannot be used; the rest is then empty.
    """

    messages: tuple[Message, ...] = ()
    question: str = ""
    answer: str | None = None
    problem: str | None = None


def read_conversation(turns: Sequence[Any]) -> Conversation:
    """Read the turns of one row; what is malformed ends as `problem`, never as an exception."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _read_turn(turn)
        if isinstance(message, str):
            return Conversation(problem=f"turn {number} of the conversation {message}")
        messages.append(message)
    answer = None
    if messages and messages[-1].role == "assistant":
        answer = messages.pop().content
    question = next((message.content for message in reversed(messages) if message.role == "user"), None)
    if question is None:
        return Conversation(problem="the conversation has no user turn")
    if not question.strip():
        return Conversation(problem="the last user turn of the conversation is empty")
    if messages[-1].role not in ("user", "tool"):
        return Conversation(problem=f"the conversation to answer ends with a turn of the {messages[-1].role}")
    return Conversation(tuple(messages), question, answer if answer and answer.strip() else None)


def clean_text(text: str) -> str:
    """Replace half surrogate pairs, which no tokenizer and no UTF-8 file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _read_turn(turn: Any) -> Message | str:
    """The turn as a message, or the rest of a sentence that says what is wrong with it."""
    if not isinstance(turn, Mapping):
        return f"is not an object but {type(turn).__name__}"
    said_by = turn.get("role", turn.get("from"))
    role = _ROLES.get(said_by.lower()) if isinstance(said_by, str) else None
    if role is None:
        return f"has the unknown role {said_by!r}"
    content = turn.get("content", turn.get("value"))
    if isinstance(content, (list, tuple)):
        content = _joined_parts(content)
    if not isinstance(content, str):
        calls = " (tool calls are not supported)" if turn.get("tool_calls") else ""
        return f"has no text{calls}"
    return Message(role, clean_text(content))


def _joined_parts(parts: Sequence[Any]) -> str | None:
    """Text of a content that is a list of parts; None as soon as one part is no text (an image)."""
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)
