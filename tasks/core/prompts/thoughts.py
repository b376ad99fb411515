"""Thoughts are not the answer: the markers around them, and a text split into its answer and its thoughts.

The rules, in this order:

1. Thoughts are the blocks at the very beginning of a text, one or several in a row, with nothing but white space
   before and between them. A marker that comes later, in prose or in code, is part of the answer.
2. A text whose opening marker stands in the prompt begins inside its thoughts. So does one that has a closing
   marker without any opening one before it, unless that closing marker is quoted, in code, or followed by the
   punctuation of a sentence: then the text speaks about the marker.
3. A closing marker in quotes does not end thoughts. An opening marker inside thoughts takes a closing one of its
   own where there is one, and none where there is not.
4. Thoughts that never close leave an empty answer.
5. White space around the answer's beginning and around the thoughts is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import NamedTuple

from tasks.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MarkerPair:
    """What stands around thoughts, and around the answer behind them where the format marks that too.

    An empty `opening` means that every text begins inside its thoughts.
    """

    opening: str
    closing: str
    answer_opening: str = ""
    answer_closing: str = ""


@dataclass(frozen=True, slots=True)
class ThoughtMarkers:
    """The pairs of markers of one model, or of a file of answers; none at all switches splitting off."""

    pairs: tuple[MarkerPair, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to split by."""
        return bool(self.pairs)

    def __or__(self, others: ThoughtMarkers) -> ThoughtMarkers:
        """These, then those of `others` that are not among them; each opening marker once."""
        pairs: dict[str, MarkerPair] = {}
        for pair in (*self.pairs, *others.pairs):
            pairs.setdefault(pair.opening, pair)
        return ThoughtMarkers(tuple(pairs.values()))

    @property
    def flat(self) -> tuple[str, ...]:
        """Opening and closing markers in turn, as a setting has them."""
        return tuple(text for pair in self.pairs for text in (pair.opening, pair.closing))

    @classmethod
    def from_setting(cls, texts: Sequence[str]) -> ThoughtMarkers:
        """The markers of a setting: opening and closing in turn. Raises ConfigError for an odd number of them."""
        if len(texts) % 2 or not all(texts[1::2]):
            raise ConfigError(
                f"thought_markers = {list(texts)!r} are no pairs of opening and closing markers",
                'write both, as in thought_markers = ["<think>", "</think>"], or [] for none',
            )
        return cls(tuple(MarkerPair(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)))


HARMONY = MarkerPair("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
"""gpt-oss's channels: everything before the message of the final channel are thoughts."""

HARMONY_PLAIN = MarkerPair("analysis", "assistantfinal")
"""What is left of those where special tokens were dropped: `analysisThe user asks …assistantfinal4`."""

KNOWN_MARKERS = ThoughtMarkers(
    (
        MarkerPair("<think>", "</think>"),
        MarkerPair("<thinking>", "</thinking>"),
        MarkerPair("<thought>", "</thought>"),
        MarkerPair("<thoughts>", "</thoughts>"),
        MarkerPair("<reasoning>", "</reasoning>"),
        MarkerPair("<seed:think>", "</seed:think>"),
        MarkerPair("[THINK]", "[/THINK]"),
        MarkerPair("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        MarkerPair(
            "<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"
        ),
        MarkerPair("◁think▷", "◁/think▷"),
        MarkerPair("<|channel>thought", "<channel|>"),
        MarkerPair("<|inner_prefix|>", "<|inner_suffix|>"),
        MarkerPair("Here is my thought process:", "Here is my response:"),
        HARMONY,
        HARMONY_PLAIN,
    )
)
"""Pairs that models in wide use write; what files of answers from elsewhere are split by."""


class Split(NamedTuple):
    """A text taken apart. `is_cut`: its thoughts never close, so there is no answer.

    `answer_start` is where in the text the answer begins, or its end when it is cut; `pair` are the markers that were
    there, None where nothing was thought.
    """

    answer: str
    reasoning: str | None = None
    is_cut: bool = False
    answer_start: int = 0
    pair: MarkerPair | None = None


def split(text: str, markers: ThoughtMarkers, starts_inside: bool = False) -> Split:
    """Split `text` into its answer and its thoughts by the rules above; without thoughts it stays as it is.

    `reasoning` is None where there are no thoughts, or empty ones.
    """
    thoughts: list[str] = []
    position = len(text) - len(text.lstrip())
    pairs = markers.pairs
    if not starts_inside and (signs := _signs(markers)) and not any(sign in text for sign in signs):
        return Split(text)
    opened = _Opened(position, pairs) if starts_inside else _opened_at(text, position, pairs)
    if opened is None:
        opened = _opened_before(text, position, pairs)
    if opened is None:
        return Split(text)
    pair = opened.pairs[0]
    while opened is not None:
        opened = opened._replace(start=_after_repeated_opening(text, opened))
        closed = _closed(text, opened)
        if closed is None:
            thoughts.append(_cleaned(text[opened.start :]))
            return Split("", _joined(thoughts), True, len(text), pair)
        thoughts.append(_cleaned(text[opened.start : closed.start]))
        position, pair = _after_space(text, closed.end), closed.pair
        opened = _opened_at(text, position, (pair,)) if pair.opening else None
    if pair.answer_opening and text.startswith(pair.answer_opening, position):
        position = _after_space(text, position + len(pair.answer_opening))
    return Split(without_answer_end(text[position:], pair), _joined(thoughts), False, position, pair)


def without_answer_end(answer: str, pair: MarkerPair) -> str:
    """The answer without the marker that the format puts behind it, if it has one."""
    ended = _pattern(pair).answer_end.search(answer)
    return answer if ended is None else answer[: ended.start()]


def open_pair(prompt: str, markers: ThoughtMarkers) -> MarkerPair | None:
    """The pair whose opening marker ends the rendered prompt, so that the model begins inside its thoughts."""
    end = prompt.rstrip()
    for pair in markers.pairs:
        if not pair.opening or any(end[found.start() :] == found.group() for found in _openings(end, pair)):
            return pair
    return None


def opens_with(text: str, pair: MarkerPair) -> bool:
    """Whether `text` begins with the opening marker of `pair`, white space aside."""
    begun = text.lstrip()
    return bool(pair.opening) and _opened_at(begun, 0, (pair,)) is not None


def could_open(text: str, markers: ThoughtMarkers) -> bool:
    """Whether `text`, the beginning of something still being written, has or may yet get an opening marker."""
    begun = text.lstrip()
    if _opened_at(begun, 0, markers.pairs) is not None:
        return True
    return any(
        pair.opening.startswith(begun)
        or (_is_channel(pair) and begun.startswith("<|channel|>") and "<|message|>" not in begun)
        for pair in markers.pairs
    )


def has_closing(text: str, markers: ThoughtMarkers) -> bool:
    """Whether a closing marker stands anywhere in `text`."""
    return any(_pattern(pair).closing.search(text) for pair in markers.pairs)


# --- where thoughts begin and end


class _Opened(NamedTuple):
    """Thoughts from `start` on, which a closing marker of `pairs` may end."""

    start: int
    pairs: tuple[MarkerPair, ...]


class _Closed(NamedTuple):
    start: int
    end: int
    pair: MarkerPair


def _opened_at(text: str, position: int, pairs: Sequence[MarkerPair]) -> _Opened | None:
    for pair in pairs:
        if not pair.opening:
            return _Opened(position, (pair,))
        found = _pattern(pair).opening.match(text, position)
        if found:
            return _Opened(found.end(), (pair,))
    return None


def _opened_before(text: str, position: int, pairs: Sequence[MarkerPair]) -> _Opened | None:
    """Thoughts that began in the prompt, as a closing marker without an opening one tells."""
    for pair in pairs:
        found = next(_closings(text, position, pair), None)
        if found is None:
            continue
        if next(_openings(text[: found.start()], pair), None) is not None:
            continue
        if not _is_spoken_about(text, found):
            return _Opened(position, (pair,))
    return None


def _closed(text: str, opened: _Opened) -> _Closed | None:
    """The end of the thoughts: the earliest that one of the pairs gives them."""
    ends = [end for pair in opened.pairs if (end := _end_by(text, opened.start, pair)) is not None]
    return min(ends, default=None)


def _end_by(text: str, start: int, pair: MarkerPair) -> _Closed | None:
    closings = [found for found in _closings(text, start, pair) if not _is_quoted(text, found)]
    if not closings:
        return None
    closings = [found for found in closings if not _is_fenced(text[start : found.start()])] or closings
    number = 0
    while number + 1 < len(closings):
        opened_again = sum(1 for _ in _openings(text[start : closings[number].start()], pair))
        if opened_again <= number:
            break
        number += 1
    return _Closed(closings[number].start(), closings[number].end(), pair)


def _after_repeated_opening(text: str, opened: _Opened) -> int:
    """Where thoughts go on whose opening marker comes once more: one in the prompt, one written by the model."""
    again = _opened_at(
        text, _after_space(text, opened.start), [pair for pair in opened.pairs if pair.opening]
    )
    return opened.start if again is None else _after_repeated_opening(text, again)


def _openings(text: str, pair: MarkerPair) -> Iterator[re.Match[str]]:
    return _pattern(pair).opening.finditer(text) if pair.opening else iter(())


def _closings(text: str, position: int, pair: MarkerPair) -> Iterator[re.Match[str]]:
    return _pattern(pair).closing.finditer(text, position)


# --- markers that are spoken about

_QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”", "\u2018": "\u2019", "«": "»", "„": "“"}
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def _is_spoken_about(text: str, marker: re.Match[str]) -> bool:
    following = text[marker.end() : marker.end() + 1]
    return (
        _is_quoted(text, marker)
        or _is_fenced(text[: marker.start()])
        or (bool(following) and following in ".,;:!?)")
    )


def _is_quoted(text: str, marker: re.Match[str]) -> bool:
    """Whether the marker stands between quotation marks, or in code between backticks on one line."""
    line_start = text.rfind("\n", 0, marker.start()) + 1
    before, after = text[line_start : marker.start()], text[marker.end() :].partition("\n")[0]
    if before.count("`") % 2 and "`" in after:
        return True
    quote = before[-1:]
    if not quote or not after.startswith(_QUOTES.get(quote, "\n")):
        return False
    if quote == "'":  # not the apostrophe of a word
        return not before[-2:-1].isalnum()
    return quote != '"' or before.count('"') % 2 == 1


def _is_fenced(before: str) -> bool:
    """Whether what follows `before` lies in a fenced block of code."""
    return len(_FENCE.findall(before)) % 2 == 1


# --- the parts, tidied


def _after_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())


def _joined(thoughts: Sequence[str]) -> str | None:
    return "\n\n".join(filter(None, thoughts)) or None


def _cleaned(thoughts: str) -> str:
    """Thoughts without the headers of the channels they were written in."""
    return _HEADER.sub("\n\n", thoughts).strip()


# --- markers as patterns

# A message of gpt-oss: what ends the one before, who speaks, the channel, maybe a recipient and a format.
_MESSAGE = (
    r"(?:<\|(?:end|call)\|>\s*)?(?:<\|start\|>assistant[^<]*)?"
    r"<\|channel\|>{}[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_THINKING_CHANNELS = "(?!final)[a-z]+"
_MESSAGE_END = re.compile(r"\s*<\|(?:end|return)\|>\s*\Z")
_NOTHING = re.compile("(?!)")
_HEADER = re.compile(_MESSAGE.format(_THINKING_CHANNELS) + r"|<\|(?:end|call)\|>\s*\Z")


def _is_channel(pair: MarkerPair) -> bool:
    return "<|channel|>" in pair.opening and "<|message|>" in pair.opening


@cache
def _signs(markers: ThoughtMarkers) -> tuple[str, ...]:
    """Words of which each text with thoughts holds one; none where a text may begin inside its thoughts."""
    if not all(pair.opening for pair in markers.pairs):
        return ()
    found = [
        ("<|channel|>",) if _is_channel(pair) else (pair.opening, pair.closing) for pair in markers.pairs
    ]
    return tuple(dict.fromkeys(chain.from_iterable(found)))


class _Patterns(NamedTuple):
    opening: re.Pattern[str]
    closing: re.Pattern[str]
    answer_end: re.Pattern[str] = _NOTHING


@cache
def _pattern(pair: MarkerPair) -> _Patterns:
    if _is_channel(pair):
        closing = pair.closing.partition("<|channel|>")[2].partition("<|message|>")[0] or "final"
        return _Patterns(
            re.compile(_MESSAGE.format(_THINKING_CHANNELS)),
            re.compile(_MESSAGE.format(re.escape(closing))),
            _MESSAGE_END,
        )
    if pair == HARMONY_PLAIN:  # words of the language too: only where they are glued to what follows
        return _Patterns(
            re.compile(r"analysis(?=[A-Z]|\S[\s\S]*assistantfinal)"), re.compile(r"assistantfinal(?=\S)")
        )
    answer_end = rf"\s*{re.escape(pair.answer_closing)}\s*\Z" if pair.answer_closing else "(?!)"
    return _Patterns(
        re.compile(re.escape(pair.opening)), re.compile(re.escape(pair.closing)), re.compile(answer_end)
    )
