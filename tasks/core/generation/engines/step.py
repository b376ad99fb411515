"""One step of the rows in flight: which tokens go through the model together, and the logits that choose the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.generation.engines.packed_attention import (
    DecodeGroup,
    PackedStep,
    PrefillSegment,
    running,
)
from tasks.core.generation.engines.slots import Pool, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def forward(
    model: PreTrainedModel, device: str, step: StepPlan, windows: set[int | None] | None = None
) -> torch.Tensor:
    """Run one step; returns logits of shape [rows that choose, vocabulary], of the last token if none does.

    Adds the sliding windows that the layers asked for to `windows`.
    """
    import torch

    keep = torch.tensor(step.choosing_places or [len(step.input_ids) - 1], device=device)
    packed = PackedStep(step.groups, step.segments, step.prefix, set() if windows is None else windows)
    with torch.inference_mode(), running(packed):
        output = model(
            input_ids=torch.tensor([step.input_ids], device=device),
            position_ids=torch.tensor([step.positions], device=device),
            use_cache=False,
            logits_to_keep=keep,
        )
    logits: torch.Tensor = output.logits[0]
    return logits


class StepPlan:
    """The layout of one step: its tokens, their positions, and where next tokens are chosen."""

    def __init__(self, device: str, prefix: Row | None = None) -> None:
        self._device = device
        self.prefix = prefix
        self.input_ids: list[int] = []
        self.positions: list[int] = []
        self.groups: list[DecodeGroup] = []
        self.segments: list[PrefillSegment] = []
        self.choosing: list[Row] = []
        self.choosing_places: list[int] = []

    def decode(self, pool: Pool) -> None:
        """Add the newest token of each of the pool's rows, in slot order."""
        import torch

        start = len(self.input_ids)
        lengths: list[int] = []
        for row in pool.dense_rows():
            self._choose(row, len(self.input_ids))
            self.input_ids.append(row.new_tokens[-1])
            self.positions.append(row.cached)
            row.cached += 1
            lengths.append(row.cached)
        after = torch.tensor(lengths, device=self._device)
        shared = 0 if self.prefix is None else self.prefix.cached
        self.groups.append(DecodeGroup(pool, start, len(self.input_ids), after, shared))

    def prefill(self, row: Row, count: int) -> int:
        """Add the next `count` tokens of the row's prompt; returns `count`."""
        self._read(row, count)
        if row.prefilled:
            self._choose(row, len(self.input_ids) - 1)
        return count

    def score(self, row: Row, count: int, first: int) -> range:
        """Add the next `count` tokens of a row that is only read; returns the tokens whose logits are kept.

        Those are the row's tokens from number `first` on.
        """
        begin, place = row.cached, len(self.input_ids)
        self._read(row, count)
        kept = range(max(begin, first), begin + count)
        self.choosing_places.extend(place + token - begin for token in kept)
        return kept

    def _read(self, row: Row, count: int) -> None:
        prompt, start = row.request.token_ids, len(self.input_ids)
        self.segments.append(PrefillSegment(row, start, start + count, row.cached))
        self.input_ids.extend(prompt[row.cached : row.cached + count])
        self.positions.extend(range(row.cached, row.cached + count))
        row.cached += count

    def _choose(self, row: Row, place: int) -> None:
        self.choosing.append(row)
        self.choosing_places.append(place)
