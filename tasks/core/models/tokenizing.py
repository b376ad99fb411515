"""A model's tokenizer, with its end, padding and vocabulary settled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tasks.core.errors import ModelLoadError
from tasks.core.models.checking import check_vocabulary
from tasks.core.models.explaining import explained
from tasks.core.models.specs import ModelSource, gguf_argument

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def tokenizer_of(source: ModelSource, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing padding token becomes the end token, and padding goes to the left.

    Raises ModelLoadError when there is none, it cannot end an answer, or it does not fit the model.
    """
    from transformers import AutoTokenizer

    files = source.tokenizer_files
    if files.gguf_name is None and not any(files.directory.glob("*token*")):
        raise ModelLoadError(
            f"{files.model_id} has no tokenizer (no tokenizer.json or tokenizer_config.json)",
            "save the tokenizer of its base model into the same directory",
        )
    with explained(f"the tokenizer of {files.model_id}"):
        tokenizer = AutoTokenizer.from_pretrained(
            files.directory, trust_remote_code=source.spec.trust_remote_code, **gguf_argument(files)
        )
    if source.spec.chat_template is not None:
        tokenizer.chat_template = source.spec.chat_template
    text_config = config.get_text_config()
    if files.gguf_name is not None:
        tokenizer = without_invented_tokens(tokenizer, text_config.vocab_size)
    if source.adapter is None and not source.spec.for_training:  # those two make room for new tokens
        check_vocabulary(tokenizer, text_config.vocab_size, source.spec.model_id)
    if tokenizer.eos_token is None:
        end_ids = as_list(text_config.eos_token_id)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_ids[0]) if end_ids else None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token of the vocabulary serves
    if tokenizer.pad_token is None:
        raise ModelLoadError(
            f"the tokenizer of {files.model_id} has neither an end nor a padding token: answers could not end",
            "set eos_token in its tokenizer_config.json",
        )
    tokenizer.padding_side = "left"  # the answer follows the prompt's last token
    return tokenizer


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


def as_list(token_ids: int | list[int] | None) -> list[int]:
    """Configurations name one end token, several or none."""
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
