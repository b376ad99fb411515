"""Making a conversation fit: the oldest exchanges go first, then the left of the question's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tasks.core.data.chat_tokenization import ChatTokenizer
from tasks.core.records import Message

Turns = tuple[Message, ...]
Encoded = TypeVar("Encoded")


def shorten(
    turns: Turns,
    encode: Callable[[Turns], tuple[Encoded, int]],
    limit: int,
    tokenizer: ChatTokenizer,
) -> tuple[Encoded, int] | None:
    """Shorten `turns` until they have at most `limit` tokens; None if not even one token of the question fits.

    `encode` returns what it made of the turns, and their token count; so does this function. System
    text, answers to learn, and all that the template writes stay whole. The result is the encoding of
    a real, shorter conversation, so that nothing in it looks cut to the model but the text itself.
    """
    encoded, length = encode(turns)
    while length > limit:
        oldest = _oldest_exchange(turns)
        if oldest is None:
            return _cut_text(turns, _last_user(turns), encode, limit, length, tokenizer)
        start, end = oldest
        if turns[start].role == "user":
            cut = _cut_text(turns, start, encode, limit, length, tokenizer)
            if cut is not None:
                return cut
        turns = turns[:start] + turns[end:]
        encoded, length = encode(turns)
    return encoded, length


def _cut_text(
    turns: Turns,
    index: int,
    encode: Callable[[Turns], tuple[Encoded, int]],
    limit: int,
    length: int,
    tokenizer: ChatTokenizer,
) -> tuple[Encoded, int] | None:
    """Cut the left of one turn's text; None if that does not suffice."""
    content = turns[index].content
    starts = tokenizer.token_starts(content)
    cut = 0
    while length > limit:
        cut += length - limit
        if cut >= len(starts) or not content[starts[cut] :].strip():
            return None
        shorter = Message(turns[index].role, content[starts[cut] :])
        encoded, length = encode((*turns[:index], shorter, *turns[index + 1 :]))
    return encoded, length


def _last_user(turns: Sequence[Message]) -> int:
    return max(index for index, turn in enumerate(turns) if turn.role == "user")


def _oldest_exchange(turns: Sequence[Message]) -> tuple[int, int] | None:
    """Range of the turns from the first that is not the system's up to the next user turn; None for the last."""
    start = next(index for index, turn in enumerate(turns) if turn.role != "system")
    following = (index for index in range(start + 1, len(turns)) if turns[index].role == "user")
    end = next(following, None)
    return None if end is None else (start, end)
