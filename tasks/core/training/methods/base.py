"""What a training method is: columns -> rows -> batch -> loss.

The trainer around it knows nothing else of a method: the order of rows, optimizer steps, checkpoints, validation and
what is published are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from tasks.core.training.methods.rows import Sequences, TokenizedRows, TrainingData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tasks.core.config import FineTunerConfig

Batch: TypeAlias = dict[str, Any]
"""What a loss is computed from: tensors under names of the method's own, and two counts that every batch has.

`token_count` is without padding and is told as progress; `item_count` is what a mean loss is a mean of: learnt tokens,
or pairs.
"""
Collate: TypeAlias = Callable[[Sequence[int]], Batch]
"""Makes the batch of these sequences."""
BatchLoss: TypeAlias = "Callable[[Any, Batch], torch.Tensor]"
"""The summed loss of a model on a batch; the trainer divides it by the items of the whole optimizer step."""


class TrainingMethod(ABC):
    """One way to learn from rows. It holds no state: what depends on a training is handed in."""

    name: ClassVar[str]
    """What `fine_tuner.training_method` calls it; it enters the identity of a training."""

    @abstractmethod
    def read(self, config: FineTunerConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
        """Read and tokenise the training rows and, where set, the validation rows; before weights are loaded.

        Raises ConfigError for settings that this method cannot keep, DataError when a dataset or column is missing,
        or no row is left.
        """

    def sequences(self, rows: TokenizedRows, config: FineTunerConfig) -> Sequences | None:
        """Which rows belong together in a batch, as packed rows or pairs do; None: each stands alone."""
        return None

    def check_model(self, model: Any, config: FineTunerConfig) -> None:  # noqa: B027  # most have nothing to check
        """Raise TrainingError where this model cannot be trained as the settings say."""

    @abstractmethod
    def collator(self, rows: TokenizedRows, sequences: Sequences | None, pad_token_id: int) -> Collate:
        """What makes batches of the rows; `sequences` are those of this method."""

    @abstractmethod
    def loss(self, model: Any) -> BatchLoss:
        """How a batch is scored. Asked once in each try, with the model before its first update."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Rows, how they are grouped into sequences (None: one row each), and what makes batches of them."""

    rows: TokenizedRows
    sequences: Sequences | None
    collator: Collate

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        lengths = self.rows.lengths
        if self.sequences is None:
            return lengths
        return [sum(lengths[row] for row in rows) for rows in self.sequences]
