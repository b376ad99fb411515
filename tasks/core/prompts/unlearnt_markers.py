"""Markers of a chat template that the base model never saw: what an adapter alone cannot teach it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.core.errors import TemplateError
from tasks.core.prompts.chat_template import ChatTemplate

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A row of the embedding this much shorter than the others was never moved from its start near zero.
_SHORT = 0.02
_ROWS_AT_ONCE = 8192


def warn_of_unseen_markers(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn when the template's markers are tokens without a meaning of their own, and the embedding does not learn."""
    embedding = model.get_input_embeddings()
    if any(part.requires_grad for part in embedding.parameters()):
        return
    try:
        markers = ChatTemplate(tokenizer).markers if tokenizer.chat_template else ()
    except TemplateError:  # told where the rows are read
        return
    ids = [tokenizer.convert_tokens_to_ids(marker) for marker in markers]
    unseen = unseen_tokens(embedding.weight, ids)
    if unseen:
        names = ", ".join(marker for marker, token_id in zip(markers, ids, strict=True) if token_id in unseen)
        logger.warning(
            "The base model never saw the markers %s of its chat template: their embeddings are those of unused "
            "tokens, and this adapter does not train them. It may not learn where an answer begins and ends. Put "
            "embed_tokens and lm_head into modules_to_save, set full_finetuning = true, or set chat_template to "
            "one that is made of ordinary words.",
            names,
        )


def unseen_tokens(weights: torch.Tensor, token_ids: Sequence[int]) -> set[int]:
    """Those of `token_ids` whose row in `weights` (tokens, width) is near zero or is that of another token too."""
    import torch

    with torch.no_grad():
        usual = float(weights[:: max(1, len(weights) // 1000)].float().norm(dim=1).median())
        unseen = set()
        for token_id in token_ids:
            row = weights[token_id]
            equal = sum(int((part == row).all(dim=1).sum()) for part in torch.split(weights, _ROWS_AT_ONCE))
            if equal > 1 or float(row.float().norm()) < _SHORT * usual:
                unseen.add(token_id)
        return unseen
