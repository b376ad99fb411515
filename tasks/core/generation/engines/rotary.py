"""Rotary positions that depend on the longest row of a forward pass, so that rows are not independent.

With `dynamic` and `longrope` scaling transformers chooses the frequencies of a whole step by its largest position:
one long row changes the answers of the short rows beside it. See transformers.modeling_rope_utils.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def independent_tokens(model: PreTrainedModel) -> int | None:
    """Tokens (prompt and answer) up to which rows may share a step; None when their length changes nothing."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    borders: list[int] = []
    # One set of parameters, or one for each kind of layer.
    for part in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        if part.get("rope_type") == "longrope":
            borders.append(int(part["original_max_position_embeddings"]))
        elif part.get("rope_type") == "dynamic":
            borders.append(int(config.max_position_embeddings))
    return min(borders, default=None)


def why_rows_depend(model: PreTrainedModel, longest_tokens: int | None) -> str | None:
    """Say why rows of up to `longest_tokens` (None: any length) cannot share a step, or None when they can."""
    border = independent_tokens(model)
    if border is None or (longest_tokens is not None and longest_tokens <= border):
        return None
    longest = "any length" if longest_tokens is None else f"up to {longest_tokens} tokens"
    return f"rotary positions that change beyond {border} tokens, with rows of {longest}"
