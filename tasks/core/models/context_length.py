"""How many tokens a model is made for, and whether it can take more at all."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.core.models.specs import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ContextLength:
    """Tokens of prompt and answer together that a model is made for; None where its config does not say.

    `is_fixed` means that there are no positions beyond: the model has a table of them, learnt or computed.
    """

    tokens: int | None
    is_fixed: bool


def context_length(model: PreTrainedModel) -> ContextLength:
    """Read it from the config: `max_position_embeddings`, which older models call `n_positions`.

    Rotary positions (Su et al. 2021, arXiv:2104.09864) are computed for any length, so with them the figure is a
    matter of quality; with all others it is taken for a limit.
    """
    tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rotary = any(type(module).__name__.endswith("RotaryEmbedding") for module in model.modules())
    return ContextLength(tokens, is_fixed=tokens is not None and not rotary)


def context_length_of(spec: ModelSpec) -> ContextLength:
    """The same without weights in memory. Raises ModelNotFoundError, ModelLoadError."""
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.core.models.explaining import explained
    from tasks.core.models.specs import find_source, read_config

    config = read_config(find_source(spec, with_weights=False))
    with explained(spec.model_id), torch.device("meta"):
        return context_length(
            AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        )


def possible_length(context: ContextLength, *, max_sequence_length: int, max_new_tokens: int = 0) -> int:
    """Return `max_sequence_length` (tokens), or what the model can take if that is less.

    Raises ConfigError when that leaves no room for a prompt.
    """
    if context.tokens is None or not context.is_fixed or context.tokens >= max_sequence_length:
        return max_sequence_length
    if max_new_tokens >= context.tokens:
        raise ConfigError(
            f"max_new_tokens = {max_new_tokens} leaves no room for a prompt: the model has {context.tokens} positions",
            f"set inferencer.max_new_tokens well below {context.tokens}, or choose a model with a longer context",
        )
    logger.warning(
        "the model has %d positions, so prompt and answer have at most that many tokens, not the %d of "
        "max_sequence_length",
        context.tokens, max_sequence_length,
    )  # fmt: skip
    return context.tokens
