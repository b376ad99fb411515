"""Why a model's results are no numbers: which of its weights hold NaN or infinity, or that values overflowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.core.models.loading import LoadedModel

_NAMED = 3


def broken_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights that hold NaN or infinity, in the model's order. Reads all weights: seconds for 7B."""
    import torch

    names: list[str] = []
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or weight.numel() == 0 or weight.device.type == "meta":
                continue  # packed by a quantisation, or not in memory
            low, high = torch.aminmax(weight.detach())  # both are NaN where one value is
            if not (bool(low.isfinite()) and bool(high.isfinite())):
                names.append(name)
    return names


def why_not_finite(model: LoadedModel) -> str:
    """Say in one clause what probably makes a model's results NaN or infinite, and what helps."""
    names, dtype = broken_weights(model.model), model.identity.dtype
    if names:
        listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if names[_NAMED:] else "")
        checkpoint = "they were damaged when the model was saved, or its training diverged"
        cause = f"{checkpoint}, or exceed float16: try bfloat16" if dtype == "float16" else checkpoint
        hold = "weight holds" if len(names) == 1 else "weights hold"
        return f"{len(names)} {hold} NaN or infinity ({listed}): {cause}"
    if dtype == "float16":
        return 'all weights are finite, so a value overflowed float16: set dtype to "bfloat16" or "float32"'
    return f"all weights are finite, so a value overflowed {dtype}, or the model divides by zero"
