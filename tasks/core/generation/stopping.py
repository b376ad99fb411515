"""When an answer ends: an end token, a stop string, or no room left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tasks.core.prompts.answer_reading import AnswerReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopRules:
    """Decides after each token whether a row is finished, and turns its tokens into text.

    A stop string ends the answer only: one in a row's thoughts does not end them. `thought_markers` as in the
    generation settings.
    """

    # A stop string is looked for in the text of the newest tokens only; a token is at least one byte, so this
    # many more tokens than the longest string has bytes always covers it with some context for decoding.
    _CONTEXT_TOKENS = 8

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        stop_strings: Sequence[str],
        thought_markers: Sequence[str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._markers = thought_markers
        self._eos = frozenset(eos_ids)
        self._strings = tuple(stop_strings)
        longest_bytes = max((len(text.encode()) for text in self._strings), default=0)
        self.window_tokens = longest_bytes + self._CONTEXT_TOKENS
        """Newest tokens of an answer that show whether it ends with a stop string."""

    def finished(
        self, token_ids: Sequence[int], max_new_tokens: int, prompt_ids: Sequence[int] = ()
    ) -> Literal["stop", "length"] | None:
        """Why the row is finished after `token_ids` (its new tokens), or None when it goes on.

        `prompt_ids`, or their end, tell whether it began inside its thoughts.
        """
        if token_ids and token_ids[-1] in self._eos:
            return "stop"
        if self.ends_with_stop_string(token_ids, prompt_ids):
            return "stop"
        return "length" if len(token_ids) >= max_new_tokens else None

    def ends_with_stop_string(self, token_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> bool:
        """Whether the newest of `token_ids` complete a stop string in the answer."""
        return self.may_end(token_ids) and self._reader.has_stop_string(token_ids, prompt_ids)

    def may_end(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string is among the newest tokens; it may still be part of thoughts."""
        if not self._strings:
            return False
        tail = self._decode(token_ids[-self.window_tokens :])
        return any(text in tail for text in self._strings)

    def cut(
        self, token_ids: Sequence[int], max_new_tokens: int, prompt_ids: Sequence[int] = ()
    ) -> tuple[tuple[int, ...], Literal["stop", "length"]]:
        """Drop what an engine generated or padded after the row's own end; also say why it ended there."""
        end = min(len(token_ids), max_new_tokens)
        for count in range(1, end + 1):
            if token_ids[count - 1] in self._eos:
                return tuple(token_ids[:count]), "stop"
            newest = token_ids[max(0, count - self.window_tokens) : count] if self._strings else ()
            if self.may_end(newest) and self._reader.has_stop_string(token_ids[:count], prompt_ids):
                return tuple(token_ids[:count]), "stop"
        return tuple(token_ids[:end]), "length"

    @cached_property
    def _reader(self) -> AnswerReader:
        return AnswerReader(self._tokenizer, self._markers, self._strings)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return what was written: without special tokens, cut before the first stop string.

        Thoughts are split off later, from the tokens; see `AnswerReader`.
        """
        answer = self._decode(token_ids)
        for text in self._strings:
            answer = answer.partition(text)[0]
        return answer

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
