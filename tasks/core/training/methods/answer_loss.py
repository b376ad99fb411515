"""The loss of the answers, with the language-model head computed only where there is something to learn.

For short answers the head over a large vocabulary costs more than the rest of the model. The model's own
forward runs unchanged; only the head's input is narrowed, so whatever a model does with its logits
(soft-capping, scaling) happens to those that remain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class AnswerHead:
    """Narrows the input of `model`'s head to chosen positions while `logits_at` runs."""

    def __init__(self, model: nn.Module) -> None:
        self._positions: torch.Tensor | None = None
        head = _base_of(model).get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._narrow)

    def _narrow(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        positions = self._positions
        if positions is None or not inputs or inputs[0].dim() != 3:
            return None
        hidden = inputs[0]
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions.to(hidden.device))
        return (chosen[None], *inputs[1:])

    def logits_at(
        self,
        model: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [positions, vocabulary] at positions of the flattened `input_ids` [rows, length]."""
        arguments = {} if position_ids is None else {"position_ids": position_ids}
        self._positions = positions
        try:
            logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, **arguments).logits
        finally:
            self._positions = None
        if logits.shape[:2] != (
            1,
            len(positions),
        ):  # computed by a way around the head's module: all are there
            return logits.reshape(-1, logits.shape[-1]).index_select(0, positions.to(logits.device))
        return logits[0]


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies in float32; divide by the number of targets of the whole step."""
    from torch.nn import functional

    return functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
