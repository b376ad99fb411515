"""Memory that a step takes besides the cache: intermediate results of its tokens, and its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.memory.device_memory import forget_traceback, is_out_of_memory, release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 512
_FLOAT32_BYTES = 4


def activation_bytes(model: PreTrainedModel, device: str, *, tokens: int, rows: int) -> int:
    """Bytes that a step over `tokens` takes while it runs, `rows` of which choose their next token.

    On CUDA the layers' part is measured with one forward pass; elsewhere, where no allocator tells its peak, it is
    that of the widest layer by the model's shape.
    """
    measured = _measured_bytes_per_token(model, device) if device.startswith("cuda") else None
    per_token = _layer_bytes_per_token(model) if measured is None else measured
    return tokens * per_token + rows * _logit_bytes_per_row(model)


def _layer_bytes_per_token(model: PreTrainedModel) -> int:
    """Residual, norm, queries and attended values of hidden size, then gate, up and their product in the MLP."""
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return (4 * hidden + 3 * inner) * _value_bytes(model)


def _logit_bytes_per_row(model: PreTrainedModel) -> int:
    """Logits as the model gives them, in float32, and the scores that sampling makes of these."""
    return int(model.config.get_text_config().vocab_size) * (_value_bytes(model) + 2 * _FLOAT32_BYTES)


def _value_bytes(model: PreTrainedModel) -> int:
    return max(2, int(next(iter(model.parameters())).element_size()))  # quantised weights compute in 16 bits


def _measured_bytes_per_token(model: PreTrainedModel, device: str) -> int | None:
    """Peak of one forward pass less what was held before it, per token; None if the model does not take it."""
    import torch

    # Half of the positions: some models begin to count them after an offset, and one too many ends all work on CUDA.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * PROBE_TOKENS
    tokens = max(1, min(PROBE_TOKENS, positions // 2))
    try:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            input_ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        return -(-(torch.cuda.max_memory_allocated(device) - before) // tokens)
    except (RuntimeError, TypeError, ValueError) as exc:
        failure: Exception = exc
    forget_traceback(failure)
    if is_out_of_memory(failure):
        release(device)
    return None
