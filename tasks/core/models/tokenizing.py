"""A model's tokenizer, with its end, padding and vocabulary settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.errors import ModelLoadError
from tasks.core.models.checking import check_vocabulary
from tasks.core.models.explaining import explained
from tasks.core.models.gguf import without_invented_tokens
from tasks.core.models.specs import ModelSource, gguf_argument

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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


def as_list(token_ids: int | list[int] | None) -> list[int]:
    """Configurations name one end token, several or none."""
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end an answer: the model's generation config's, the tokenizer's, and the chat template's.

    The last is the token that closes an assistant's turn. A base model that is tuned with a template learns to
    write that token, and its configuration often names another one.
    """
    from tasks.core.prompts.chat_template import turn_end_id

    configured = model.generation_config.eos_token_id
    ids: list[int] = []
    if isinstance(configured, int):
        ids.append(configured)
    elif configured is not None:
        ids.extend(int(token_id) for token_id in configured)
    ids.extend(int(end) for end in (tokenizer.eos_token_id, turn_end_id(tokenizer)) if end is not None)
    return tuple(dict.fromkeys(ids))
