"""From rows to tensors: the order of an epoch, and padded batches that say where the loss is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tasks.core.training.methods.rows import IGNORED_LABEL, Sequences, TokenizedRows

_GROUPED_BATCHES = 50  # rows of so many batches are sorted together: little padding, still a mixed order
_PADDED_MULTIPLE = 8


class LengthGroupedOrder:
    """A sampler: rows of similar length stand together, batches come in random order.

    The order is a function of seed and epoch alone, so a resumed epoch goes on where it stopped. Only a last
    batch may be smaller. `batch_size` counts the rows of a whole optimizer step, so it stays the same when
    memory asks for smaller pieces of it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        shuffled = random.permutation(len(self._lengths))
        # At least four groups, so that small data is not simply sorted.
        groups = max(4, -(-len(shuffled) // (_GROUPED_BATCHES * self._batch_size)))
        size = max(1, len(shuffled) // (groups * self._batch_size)) * self._batch_size
        batches = []
        for start in range(0, len(shuffled), size):
            group = shuffled[start : start + size]
            ordered = group[np.argsort(-self._lengths[group], kind="stable")]
            batches += [
                ordered[at : at + self._batch_size] for at in range(0, len(ordered), self._batch_size)
            ]
        *whole, last = batches
        order = random.permutation(len(whole))
        if self._epoch == 0 and len(whole) > 1:  # the largest comes first: memory trouble shows at once
            largest = max(range(len(whole)), key=lambda index: int(self._lengths[whole[index]].max()))
            order = np.concatenate(([largest], order[order != largest]))
        for index in order.tolist():
            yield from whole[index].tolist()
        yield from last.tolist()


class Collator:
    """Pads sequences on the right and says where the loss is taken.

    Right padding needs no attention mask under causal attention, which keeps the fast kernels. A batch holds
    `input_ids` [rows, length], `positions` [targets] into the flattened rows where a target is predicted, `targets`
    [targets], `position_ids` when rows are packed, `item_count` (the targets), and `token_count` without padding.
    """

    def __init__(self, rows: TokenizedRows, sequences: Sequences | None, pad_token_id: int) -> None:
        self._rows = rows
        self._sequences = sequences
        self._pad_token_id = pad_token_id

    def __call__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Build the batch of these sequences."""
        import torch

        sequences = [(index,) if self._sequences is None else self._sequences[index] for index in indices]
        longest = max(sum(len(self._rows[row][0]) for row in rows) for rows in sequences)
        length = -(-longest // _PADDED_MULTIPLE) * _PADDED_MULTIPLE
        shape = (len(sequences), length)
        ids = np.full(shape, self._pad_token_id, np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        places = np.zeros(shape, np.int64)
        for line, rows in enumerate(sequences):
            at = 0
            for row in rows:
                row_ids, row_labels = self._rows[row]
                end = at + len(row_ids)
                ids[line, at:end], labels[line, at:end] = row_ids, row_labels
                places[line, at:end] = np.arange(end - at)
                at = end
            places[line, at:] = np.arange(length - at)  # padding is a row of its own
        targeted = np.flatnonzero(labels != IGNORED_LABEL)
        batch: dict[str, Any] = {
            "item_count": len(targeted),
            "token_count": sum(len(self._rows[row][0]) for rows in sequences for row in rows),
            "input_ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(targeted - 1),  # never a row's start: its label is always -100
            "targets": torch.from_numpy(labels.reshape(-1)[targeted]),
        }
        if self._sequences is not None:
            batch["position_ids"] = torch.from_numpy(places)
        return batch
