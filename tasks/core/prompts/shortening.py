"""Making a conversation fit: the oldest exchanges go first, then the left of the question's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tasks.core.prompts.chat_tokenization import ChatTokenizer
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
    if length <= limit:
        return encoded, length
    starts = _exchange_starts(turns)

    def without(count: int) -> Turns:
        """The turns without the oldest exchanges, `count` of them."""
        return turns[: starts[0]] + turns[starts[count] :]

    def cut(count: int, index: int) -> tuple[Encoded, int] | None:
        left = without(count)
        return _cut_text(left, index, encode, limit, encode(left)[1] if count else length, tokenizer)

    dropped = _first_that_fits(lambda count: encode(without(count)), len(starts) - 1, limit)
    if dropped is None:
        left = without(len(starts) - 1)
        last = _last_user(left)
        return cut(len(starts) - 1, last) or _keep_end(left, last, encode, limit)
    count, fitted = dropped
    is_question = turns[starts[count - 1]].role == "user"
    return (cut(count - 1, starts[0]) if is_question else None) or fitted


def _first_that_fits(
    encode: Callable[[int], tuple[Encoded, int]], most: int, limit: int
) -> tuple[int, tuple[Encoded, int]] | None:
    """The smallest count from 1 to `most` whose encoding fits, and that; None if none does.

    The more is left out, the shorter the rest. So not every count is tried: of 5,000 exchanges about 25 are.
    """
    best: tuple[int, tuple[Encoded, int]] | None = None
    low, count = 0, 1
    while best is None and low < most:
        count = min(count, most)
        encoded = encode(count)
        if encoded[1] <= limit:
            best = count, encoded
        else:
            low, count = count, count * 2
    while best is not None and best[0] - low > 1:
        middle = (low + best[0]) // 2
        encoded = encode(middle)
        if encoded[1] <= limit:
            best = middle, encoded
        else:
            low = middle
    return best


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


def _keep_end(
    turns: Turns, index: int, encode: Callable[[Turns], tuple[Encoded, int]], limit: int
) -> tuple[Encoded, int] | None:
    """Keep as much of the end of one turn's text as fits; None if not even its last character does.

    For text whose tokens are not those of the prompt: control tokens in it are written as plain text there, of several
    tokens each, and a template may write it twice.
    """
    content = turns[index].content.rstrip()

    def with_end(length: int) -> tuple[Encoded, int]:
        shorter = Message(turns[index].role, content[len(content) - length :])
        return encode((*turns[:index], shorter, *turns[index + 1 :]))

    best: tuple[Encoded, int] | None = None
    low, high = 0, 1  # so many characters fit, so many do not or were not tried
    while high <= len(content) and (encoded := with_end(high))[1] <= limit:
        best, low, high = encoded, high, min(high * 2, max(len(content), high + 1))
    while high - low > 1:
        middle = (low + high) // 2
        encoded = with_end(middle)
        if encoded[1] <= limit:
            best, low = encoded, middle
        else:
            high = middle
    return best


def _last_user(turns: Sequence[Message]) -> int:
    return max(index for index, turn in enumerate(turns) if turn.role == "user")


def _exchange_starts(turns: Sequence[Message]) -> list[int]:
    """Where exchanges begin: the first turn that is not the system's, and each user turn behind it."""
    first = next(index for index, turn in enumerate(turns) if turn.role != "system")
    return [first, *(index for index in range(first + 1, len(turns)) if turns[index].role == "user")]
