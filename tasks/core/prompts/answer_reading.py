"""From the tokens that a model wrote to its answer and, apart from it, its thoughts: one place after any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tasks.core.prompts.thought_markers import find_markers
from tasks.core.prompts.thoughts import (
    KNOWN_MARKERS,
    MarkerPair,
    Split,
    ThoughtMarkers,
    could_open,
    has_closing,
    open_pair,
    split,
    without_answer_end,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More tokens than any marker has.
_MARKER_TOKENS = 48


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """An answer without its thoughts; see `Completion` for the fields."""

    text: str
    reasoning: str | None = None
    reasoning_tokens: int = 0
    is_cut_in_thoughts: bool = False


class Beginning(NamedTuple):
    """How an answer begins that is still being written.

    `open`: nothing is decided; `thinking`: in thoughts; `thought`: behind thoughts, and more may follow; `answer`: the
    answer has begun, after `thought_tokens`, whose last one may hold its `first_piece`.
    """

    state: Literal["open", "thinking", "thought", "answer"]
    thought_tokens: int = 0
    first_piece: str = ""


class AnswerReader:
    """Splits what a model wrote by its markers, on tokens: those that are special are lost in a plain decoding.

    `setting` are the markers of the settings; None takes those that template and tokenizer declare and, where an
    answer begins with one of them, the well-known ones. Stop strings end the answer, never the thoughts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        setting: Sequence[str] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(stop_strings)
        self._own = find_markers(tokenizer) if setting is None else ThoughtMarkers.from_setting(setting)
        self.markers = self._own | KNOWN_MARKERS if setting is None else self._own

    def read(self, text: str, token_ids: Sequence[int], prompt_ids: Sequence[int]) -> ReadAnswer:
        """The answer in `token_ids`, which an engine turned into `text`; without thoughts that is the answer.

        An engine that knows no tokens gives none; the text is then split.
        """
        if not self._own and split(text, self.markers).pair is None:
            return ReadAnswer(text)
        if not token_ids:
            found = self._split(text, prompt_ids)
            return ReadAnswer(self._before_stop_string(found.answer), found.reasoning, 0, found.is_cut)
        whole = self._decode(token_ids)
        found = self._split(whole, prompt_ids)
        if found.pair is None:
            return ReadAnswer(text)
        reasoning = self._without_special_tokens(found.reasoning or "").strip() or None
        if found.is_cut:
            return ReadAnswer("", reasoning, len(token_ids), True)
        count, rest = self._thought_tokens(token_ids, whole, found)
        answer = self._before_stop_string(self._answer(token_ids, found, count, rest))
        return ReadAnswer(answer, reasoning, count)

    def has_stop_string(self, token_ids: Sequence[int], prompt_ids: Sequence[int]) -> bool:
        """Whether the answer in `token_ids` holds a stop string; its thoughts may."""
        whole = self._decode(token_ids)
        found = self._split(whole, prompt_ids)
        if found.is_cut:
            return False
        answer = self._plain(token_ids)
        if found.pair is not None:
            answer = self._answer(token_ids, found, *self._thought_tokens(token_ids, whole, found))
        return any(text in answer for text in self._strings)

    def beginning(self, token_ids: Sequence[int], prompt_ids: Sequence[int]) -> Beginning:
        """How an answer begins of which `token_ids` are there so far."""
        whole = self._decode(token_ids)
        found = self._split(whole, prompt_ids)
        if found.pair is None:
            return Beginning("open" if could_open(whole, self.markers) else "answer")
        if found.is_cut:
            return Beginning("thinking")
        count, rest = self._thought_tokens(token_ids, whole, found)
        more = not found.answer or could_open(found.answer, ThoughtMarkers((found.pair,)))
        return Beginning("thought" if more else "answer", count, rest.lstrip())

    def may_close(self, token_ids: Sequence[int]) -> bool:
        """Whether a closing marker is among the newest tokens."""
        return has_closing(self._decode(token_ids[-_MARKER_TOKENS:]), self.markers)

    def open_pair(self, prompt_ids: Sequence[int]) -> MarkerPair | None:
        """The pair whose opening marker ends the prompt."""
        if not self._own:
            return None
        return open_pair(self._decode(prompt_ids[-_MARKER_TOKENS:]), self._own)

    def _split(self, text: str, prompt_ids: Sequence[int]) -> Split:
        inside = self.open_pair(prompt_ids)
        if inside is not None:
            return split(text, ThoughtMarkers((inside,)), starts_inside=True)
        return split(text, self.markers)

    def _thought_tokens(self, token_ids: Sequence[int], whole: str, found: Split) -> tuple[int, str]:
        """How many tokens the thoughts have with their markers, and what the last of them holds behind the marker."""
        thoughts = whole[: found.answer_start].rstrip()
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if self._decode(token_ids[:middle]).startswith(thoughts):
                high = middle
            else:
                low = middle + 1
        return low, self._decode(token_ids[:low])[len(thoughts) :]

    def _answer(self, token_ids: Sequence[int], found: Split, thought_tokens: int, rest: str) -> str:
        """The answer behind the thoughts; one token may hold a marker's end and the answer's beginning."""
        assert found.pair is not None
        if rest.strip():
            return self._without_special_tokens(found.answer)
        return without_answer_end(self._plain(token_ids[thought_tokens:]).lstrip(), found.pair)

    def _before_stop_string(self, answer: str) -> str:
        for text in self._strings:
            answer = answer.partition(text)[0]
        return answer

    def _without_special_tokens(self, text: str) -> str:
        for token in self._tokenizer.added_tokens_decoder.values():
            if token.special:
                text = text.replace(token.content, "")
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _plain(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class AnswerGate:
    """Holds back the tokens of thoughts while an answer is written, and lets those of the answer through.

    Tokens wait while they may yet be an opening marker. Without one, and outside of thoughts when the prompt ends,
    all are let through: a closing marker that comes later changes nothing then.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, setting: Sequence[str] | None, prompt_ids: Sequence[int]
    ) -> None:
        self._reader = AnswerReader(tokenizer, setting)
        self._prompt_ids = prompt_ids
        self._held: list[int] = []
        is_inside = self._reader.open_pair(prompt_ids) is not None
        self._now = Beginning("thinking" if is_inside else "open" if self._reader.markers else "answer")

    @property
    def is_thinking(self) -> bool:
        """Whether nothing but thoughts has come so far."""
        return self._now.state == "thinking"

    @property
    def has_thought(self) -> bool:
        """Whether thoughts came before the answer."""
        return self._now.thought_tokens > 0

    @property
    def first_piece(self) -> str:
        """What the last token of the thoughts holds of the answer."""
        return self._now.first_piece

    @property
    def token_count(self) -> int:
        """How many tokens are held back."""
        return len(self._held)

    def pass_on(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The tokens that are the answer's, of these and of those held back."""
        if self._now.state == "answer":
            return token_ids
        self._held.extend(token_ids)
        if self.is_thinking and not self._reader.may_close(self._held):
            return ()
        self._now = self._reader.beginning(self._held, self._prompt_ids)
        return self._held[self._now.thought_tokens :] if self._now.state == "answer" else ()

    def end(self) -> Sequence[int]:
        """What is left at the end: tokens that looked like a marker's beginning and were none."""
        if self._now.state != "open":
            return ()
        self._now = Beginning("answer")
        return self._held
