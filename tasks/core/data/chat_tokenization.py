"""From rendered text to token ids: encoded once, with exactly one BOS, and with positions of text in tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tasks.core.data.chat_template import Rendered, adds_bos

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
        ids, _ = self._with_one_bos(self._encode_piece(rendered.text, rendered.is_marked))
        return ids

    def encode_all(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """`encode` for many texts at once, which is several times faster."""
        plain = [text for text, is_marked in rendered if not is_marked]
        batch = iter(
            self._tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else ()
        )
        return [
            self.encode(item) if item.is_marked else self._with_one_bos(next(batch))[0] for item in rendered
        ]

    def encode_with_cuts(self, rendered: Rendered, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids, and for each cut (rising character positions) the index of the first token behind it."""
        return self.encode_all_with_cuts([rendered], [cuts])[0]

    def encode_all_with_cuts(
        self, rendered: Sequence[Rendered], cuts: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[int]]]:
        """`encode_with_cuts` for many texts at once."""
        whole = [text for text, is_marked in rendered if not is_marked and self._tokenizer.is_fast]
        encodings: Any = iter(())
        if whole:
            encodings = iter(self._tokenizer(whole, add_special_tokens=False, verbose=False).encodings)
        results = []
        for item, places in zip(rendered, cuts, strict=True):
            found = None
            if not item.is_marked and self._tokenizer.is_fast:
                encoding = next(encodings)
                indices = _token_indices(encoding.offsets, places)
                found = None if indices is None else (list(encoding.ids), indices)
            ids, indices = found if found is not None else self._encode_in_pieces(item, places)
            ids, shift = self._with_one_bos(ids)
            results.append((ids, [max(0, index + shift) for index in indices]))
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

    def _encode_in_pieces(self, rendered: Rendered, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Encode the text between the cuts on its own, so that no token lies across a cut."""
        newline = self._encode_piece("\n", False)
        ids: list[int] = []
        indices: list[int] = []
        for number, (start, end) in enumerate(pairwise((0, *cuts, len(rendered.text)))):
            if number > 0:
                indices.append(len(ids))
            piece = rendered.text[start:end]
            if not piece:
                continue
            # Some tokenizers put a space before the start of a text: a newline takes it, then goes.
            after_newline = self._encode_piece("\n" + piece, rendered.is_marked) if start else []
            if after_newline and after_newline[: len(newline)] == newline:
                ids += after_newline[len(newline) :]
            else:
                ids += self._encode_piece(piece, rendered.is_marked)
        return ids, indices

    def _with_one_bos(self, ids: list[int]) -> tuple[list[int], int]:
        """The ids with exactly one leading BOS if there should be one, and by how much they moved."""
        if self._bos_id is None:
            return ids, 0
        leading = 0
        while leading < len(ids) and ids[leading] == self._bos_id:
            leading += 1
        if leading == 0:
            return ([self._bos_id, *ids], 1) if self._adds_bos else (ids, 0)
        return ids[leading - 1 :], 1 - leading


def _token_indices(offsets: Sequence[tuple[int, int]], cuts: Sequence[int]) -> list[int] | None:
    """For each cut the first token that ends behind it; None if a token lies across a cut."""
    ends = [end for _, end in offsets]
    indices = [bisect_right(ends, cut) for cut in cuts]
    for cut, index in zip(cuts, indices, strict=True):
        if index < len(offsets) and offsets[index][0] < cut:
            return None
    return indices
