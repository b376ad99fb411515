"""Conversations in a dataset's cell: OpenAI's messages (role, content) and ShareGPT's (from, value), lists or text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tasks.core.data.cell_texts import NotTextError, clean_text, plain, scalar_text
from tasks.core.data.formats.json_texts import read_json, write_json
from tasks.core.records import Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_CALL_ROLES = {"function_call", "tool_call", "tool_calls"}
_CALL_KEYS = ("tool_calls", "tool_call", "function_call")
_CALL_PARTS = {"tool_use", "tool_call", "tool-call", "tool_result", "tool-result", "function_call"}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
_REASONING_PARTS = {"thinking", "reasoning", "thought"}
# A turn is kept out of the loss where one of these says no, or one of those says yes.
_LEARNT_KEYS = ("weight", "train", "train_on_turn", "training", "trainable", "loss", "learn")
_MASKED_KEYS = ("masked", "mask", "ignore")
_NO, _YES = {"false", "no", "0", "0.0"}, {"true", "yes", "1", "1.0"}

_ROLE_KEY, _TEXT_KEY = re.compile("""["'](role|from)["']"""), re.compile("""["'](content|value)["']""")
# Python's own way to write a list takes hundreds of times its length in memory to be read.
_LONGEST_LITERAL = 1_000_000
_CALLS_UNSUPPORTED = "is a tool call, and tool calls are not supported yet"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to answer. `question` is the last user turn, `answer` the assistant turn at the end.

    `messages` is all before that answer; an answer that is blank has no `content` here, but may have reasoning.
    `problem` says why the turns cannot be used; the rest is then empty.
    """

    messages: tuple[Message, ...] = ()
    question: str = ""
    answer: Message | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Turns:
    """The turns of one cell as they are there; `problem` says that a text was meant to be turns but is none."""

    items: list[Any] = field(default_factory=list)
    problem: str | None = None


def turns_of(value: Any) -> Turns | None:
    """The conversation that a cell holds: a list of turns, one turn, columns of turns, or any of these as text.

    None for everything else, plain text above all. JSON and what Python writes for a list are read as text.
    """
    value = plain(value)
    if isinstance(value, str):
        return _turns_of_text(value)
    if isinstance(value, Mapping):
        inner = next(
            (plain(value[name]) for name in ("messages", "conversations") if value.get(name) is not None),
            None,
        )
        if inner is not None:
            return turns_of(inner)
        said_by = plain(value.get("role", value.get("from")))
        if isinstance(said_by, (list, tuple)):  # one list for the roles, one for the contents
            return _from_columns(value)
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(map(_is_turn, value)):
        return None
    roles = {str(_first(turn, "role", "from")).strip().lower() for turn in value}
    return Turns(list(value)) if roles & (_ROLES.keys() | _CALL_ROLES) else None


def _is_turn(item: Any) -> bool:
    """Whether a value has what makes a turn: somebody who speaks, and a place for what is said."""
    return (
        isinstance(item, Mapping)
        and isinstance(_first(item, "role", "from"), str)
        and any(key in item for key in ("content", "value", *_CALL_KEYS))
    )


def _from_columns(columns: Mapping[str, Any]) -> Turns | None:
    lists = {name: plain(cells) for name, cells in columns.items()}
    count = max(len(cells) for cells in lists.values() if isinstance(cells, (list, tuple)))
    if not all(isinstance(cells, (list, tuple)) and len(cells) == count for cells in lists.values()):
        return None
    return turns_of([dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)])


def _turns_of_text(text: str) -> Turns | None:
    """Only text that is an array or object with roles is a conversation; what is cut off or misspelt is a problem."""
    start = text.lstrip()[:2000]
    if not start.startswith(("[", "{")) or _ROLE_KEY.search(start) is None or _TEXT_KEY.search(start) is None:
        return None
    try:
        value = read_json(text.encode("utf-8", "replace"))
    except (orjson.JSONDecodeError, RecursionError):
        try:
            value = ast.literal_eval(text.strip()) if len(text) <= _LONGEST_LITERAL else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            opens_turns = start.replace(" ", "").replace("\n", "").startswith(('[{"', "[{'"))
            return (
                Turns(problem="the conversation is written as text that is not valid JSON")
                if opens_turns
                else None
            )
    return None if isinstance(value, str) else turns_of(value)


def read_conversation(turns: Sequence[Any]) -> Conversation:
    """Read the turns of one row; what is malformed ends as `problem`, never as an exception."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _read_turn(turn)
        if isinstance(message, Message) and message.role == "tool" and messages:
            last = messages[-1]
            if last.role == "assistant" and not last.content.strip():  # its call is lost
                number, message = number - 1, _CALLS_UNSUPPORTED
        if isinstance(message, str):
            return Conversation(problem=f"turn {number} of the conversation {message}")
        messages.append(message)
    answer = messages.pop() if messages and messages[-1].role == "assistant" else None
    question = next((message.content for message in reversed(messages) if message.role == "user"), None)
    if question is None:
        return Conversation(problem="the conversation has no user turn")
    if not question.strip():
        return Conversation(problem="the last user turn of the conversation is empty")
    if messages[-1].role not in ("user", "tool"):
        return Conversation(problem=f"the conversation to answer ends with a turn of the {messages[-1].role}")
    return Conversation(tuple(messages), question, answer if answer and answer.content.strip() else None)


def read_answer(turn: Any) -> Message | str:
    """The one turn of a reference as a message, or the rest of a sentence that says what is wrong with it."""
    message = _read_turn(turn)
    if isinstance(message, Message) and message.role != "assistant":
        return f"is a turn of the {message.role}"
    return message


def system_text(value: Any) -> str | None:
    """The text of a system prompt that is written as a turn or a list of turns; None for everything else."""
    turns = turns_of(value)
    if turns is None or turns.problem is not None:
        return None
    messages = [_read_turn(turn) for turn in turns.items]
    texts = [
        message.content for message in messages if isinstance(message, Message) and message.role == "system"
    ]
    return "\n\n".join(texts) if len(texts) == len(messages) else None


def _read_turn(turn: Any) -> Message | str:
    """The turn as a message, or the rest of a sentence that says what is wrong with it."""
    if not isinstance(turn, Mapping):
        return f"is not an object but {type(turn).__name__}"
    said_by = _first(turn, "role", "from")
    name = said_by.strip().lower() if isinstance(said_by, str) else None
    if name in _CALL_ROLES or any(_is_filled(turn.get(key)) for key in _CALL_KEYS):
        return _CALLS_UNSUPPORTED
    role = _ROLES.get(name or "")
    if role is None:
        return f"has the unknown role {said_by!r}"
    try:
        text, thoughts = _content(_first(turn, "content", "value", "text"), role)
    except NotTextError as error:
        return str(error)
    if role != "assistant":
        return Message(role, text)
    if _is_filled(turn.get("train_detail")):
        return "is learnt in parts (train_detail), and that is not supported"
    apart = (_reasoning_text(turn.get(key)) for key in _REASONING_KEYS)
    first = next((said for said in apart if said is not None), None)
    reasoning = "\n".join(thoughts if first is None else [first, *thoughts]) or None
    return Message(role, text, reasoning, is_learnt=_is_learnt(turn) and bool(text.strip()))


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: in a table, every turn has all keys."""
    return next((plain(turn[key]) for key in keys if turn.get(key) is not None), None)


def _is_filled(value: Any) -> bool:
    value = plain(value)
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    if isinstance(value, Mapping):  # in a table, a call that is not there is an object of nothing
        return any(_is_filled(item) for item in value.values())
    return bool(value)


def _is_learnt(turn: Mapping[str, Any]) -> bool:
    def says(key: str, words: set[str]) -> bool:
        return turn.get(key) is not None and str(plain(turn[key])).strip().lower() in words

    return not (any(says(key, _NO) for key in _LEARNT_KEYS) or any(says(key, _YES) for key in _MASKED_KEYS))


def _content(content: Any, role: str) -> tuple[str, list[str]]:
    """The text of a content, and the thoughts among its parts. Raises NotTextError."""
    if isinstance(content, Mapping) and isinstance(content.get("type"), str):
        content = [content]
    if isinstance(content, (list, tuple)):
        return _joined_parts(content)
    if isinstance(content, str):
        return clean_text(content), []
    if role == "assistant" and content is not None:  # an answer that is a number, or an object to extract
        return write_json(content) if isinstance(content, Mapping) else scalar_text(content) or "", []
    raise NotTextError("has no text")


def _joined_parts(parts: Sequence[Any]) -> tuple[str, list[str]]:
    """Texts and thoughts of a content that is a list of parts; one that is neither (an image) is no text."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _CALL_PARTS:
            raise NotTextError(_CALLS_UNSUPPORTED)
        if kind in _REASONING_PARTS:
            found = (_reasoning_text(part.get(key)) for key in (kind, "text", "thinking", "reasoning"))
            thoughts += [text for text in found if text is not None][:1]
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise NotTextError("has no text")
        texts.append(text)
    return clean_text("\n".join(texts)), thoughts


def _reasoning_text(value: Any) -> str | None:
    value = plain(value)
    if isinstance(value, (list, tuple)):
        items = (
            item.get("text", item.get("thinking")) if isinstance(item, Mapping) else item for item in value
        )
        value = "\n".join(item for item in items if isinstance(item, str))
    return clean_text(value) if isinstance(value, str) and value.strip() else None
