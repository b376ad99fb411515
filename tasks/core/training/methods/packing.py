"""Several short rows in one sequence, and the proof that they do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tasks.core.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PROBE_TOKENS = 12
_LEAK_ALLOWED = 0.05  # of what plain causal attention lets through; 8-bit rounding needs a little room


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group row indices into sequences of at most `capacity` tokens: longest first, each where it fits best."""
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[row]
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, sequence = room.pop(at)
        else:
            left, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append(row)
        if left > length:
            insort(room, (left - length, sequence))
    return sequences


def check_packing(model: PreTrainedModel) -> None:
    """Refuse packing where a row would see the rows before it. Raises TrainingError.

    Attention must be cut at the rows' borders, which position ids mark. Whether a model does so is tried: another
    first row must not change the logits of the second.
    """
    import torch

    random = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, other, second = (random.integers(0, vocabulary, _PROBE_TOKENS) for _ in range(3))
    places = torch.arange(_PROBE_TOKENS).repeat(2)[None]

    def change(position_ids: torch.Tensor | None) -> float:
        """How far (largest difference) the second row's logits move when the first row is another."""
        logits = [
            _second_logits(model, np.concatenate((row, second)), position_ids) for row in (first, other)
        ]
        return float((logits[0] - logits[1]).abs().max())

    leaked, open_border = change(places), change(None)
    if leaked > _LEAK_ALLOWED * open_border:
        raise TrainingError(
            f"packing = true, but in {type(model).__name__} a packed row would be influenced by the rows before it "
            f"(another first row moves the logits by {leaked:.2g})",
            "set packing = false; batches are grouped by length, so little is lost to padding",
        )


def _second_logits(
    model: PreTrainedModel, ids: np.ndarray, position_ids: torch.Tensor | None
) -> torch.Tensor:
    import torch

    device = model.get_input_embeddings().weight.device
    arguments = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False, **arguments)
    finally:
        model.train(was_training)
    logits: torch.Tensor = output.logits[0, len(ids) // 2 :].float()
    return logits
