"""What transformers adds to the tokenizer of a GGUF file, and how it is taken away again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def without_invented_tokens(
    tokenizer: PreTrainedTokenizerBase, embedding_rows: int
) -> PreTrainedTokenizerBase:
    """Drop tokens that a GGUF file does not have but transformers' default settings add behind its last one.

    Without this, each GGUF model whose vocabulary lacks <|endoftext|> would seem not to fit its tokenizer.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    invented = {token["content"] for token in state["added_tokens"] if token["id"] >= embedding_rows}
    if not invented:
        return tokenizer
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in invented]
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if token not in invented}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **roles,
    )
