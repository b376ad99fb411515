"""From rendered text to token ids: encoded once, with exactly one BOS, and a prompt always in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.core.prompts.chat_template import Rendered, adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTokenizer:
    """Encodes rendered conversations as they stand: their control tokens are the template's.

    Rows whose user text spells a control token (`<|im_end|>` in a question) are encoded in pieces, with
    that spelling as ordinary text; all other rows are encoded whole, as the model's authors do it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bos_id: int | None = tokenizer.bos_token_id
        self._adds_bos = adds_bos(tokenizer)

    def encode(self, rendered: Rendered) -> list[int]:
        """Token ids with exactly one BOS where the model expects one."""
        return self._with_one_bos(self._encode_piece(rendered.text, rendered.is_marked))

    def encode_all(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """`encode` for many texts at once, which is several times faster."""
        plain = [text for text, is_marked in rendered if not is_marked]
        batch = iter(
            self._tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else ()
        )
        return [self.encode(item) if item.is_marked else self._with_one_bos(next(batch)) for item in rendered]

    def encode_all_with_answers(
        self, prompts: Sequence[Rendered], answers: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """The ids of each prompt, exactly those of `encode`, and of the text that follows it.

        Prompt and text are encoded as a whole where that leaves the prompt's ids as they are. Where a token
        would lie across the border, or line breaks before it would be parted otherwise, the text is encoded on
        its own: that is what a model sees which is asked the prompt.
        """
        asked = self.encode_all(prompts)
        whole = [
            prompt.text + answer
            for prompt, answer in zip(prompts, answers, strict=True)
            if self._is_encoded_whole(prompt)
        ]
        encodings: Any = iter(())
        if whole:
            encodings = iter(self._tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
        results = []
        for prompt, ids, answer in zip(prompts, asked, answers, strict=True):
            following = None
            if self._is_encoded_whole(prompt):
                both = self._with_one_bos(next(encodings))
                if both[: len(ids)] == ids:
                    following = both[len(ids) :]
            results.append((ids, self._encode_behind(answer) if following is None else following))
        return results

    def token_starts(self, text: str) -> list[int]:
        """Character positions at which `text` may be cut: where its tokens begin, or every character."""
        if not self._tokenizer.is_fast:
            return list(range(len(text)))
        offsets = self._tokenizer(text, add_special_tokens=False, verbose=False).encodings[0].offsets
        return [start for start, _ in offsets]

    def _encode_piece(self, text: str, is_marked: bool) -> list[int]:
        from transformers.utils.chat_template_utils import encode_marked_chat

        if is_marked:
            return list(encode_marked_chat(self._tokenizer, text))
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _is_encoded_whole(self, prompt: Rendered) -> bool:
        return not prompt.is_marked and self._tokenizer.is_fast

    def _encode_behind(self, text: str) -> list[int]:
        """Encode what follows another text, so that no token lies across the border."""
        if not text:
            return []
        # Some tokenizers put a space before the start of a text: a newline takes it, then goes.
        newline, after_newline = self._encode_piece("\n", False), self._encode_piece("\n" + text, False)
        if after_newline[: len(newline)] == newline:
            return after_newline[len(newline) :]
        return self._encode_piece(text, False)

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """The ids with exactly one leading BOS if there should be one."""
        if self._bos_id is None:
            return ids
        leading = 0
        while leading < len(ids) and ids[leading] == self._bos_id:
            leading += 1
        if leading == 0:
            return [self._bos_id, *ids] if self._adds_bos else ids
        return ids[leading - 1 :]
