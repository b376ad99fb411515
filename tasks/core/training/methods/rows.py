"""Training rows, tokenised and kept small: four bytes a token, so a million rows stay in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100

Tokens = NDArray[np.int32]
# Rows that one forward pass keeps together: packed ones, or the two answers of a pair.
Sequences = Sequence[Sequence[int]]


class TokenizedRows:
    """Token ids and labels of many rows in two flat arrays; a row is a view into them."""

    def __init__(self, rows: Iterable[tuple[Iterable[int], Iterable[int]]]) -> None:
        ids, labels, ends = array("i"), array("i"), array("q", [0])
        for row_ids, row_labels in rows:
            ids.extend(row_ids)
            labels.extend(row_labels)
            if len(ids) > ends[-1]:
                labels[ends[-1]] = (
                    IGNORED_LABEL  # nothing comes before the first token, so nothing predicts it
                )
            ends.append(len(ids))
        self._ids: Tokens = np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, np.int32)
        self._labels: Tokens = np.frombuffer(labels, dtype=np.int32) if labels else np.empty(0, np.int32)
        self._ends: NDArray[np.int64] = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Tokens, Tokens]:
        """Ids and labels of one row; labels are -100 where nothing is learnt."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        span = slice(self._ends[index], self._ends[index + 1])
        return self._ids[span], self._labels[span]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = np.diff(self._ends).tolist()
        return lengths

    @property
    def token_count(self) -> int:
        """Tokens of all rows."""
        return len(self._ids)

    @property
    def target_count(self) -> int:
        """Tokens that are learnt, in all rows."""
        return int(np.count_nonzero(self._labels != IGNORED_LABEL))


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one dataset that can be learnt from, and what became of the others.

    `sha256` is over the ids of the rows that are learnt, `dataset_sha256` over those of all rows, skipped ones too.
    `rows` are those of the dataset, and `earlier_count` more for answers of conversations that could not be learnt
    in the row of the last answer. `thinking_count` of them have thoughts to learn; `unlearnt_count` answers were
    lost in rows that were too long.
    """

    data_id: str
    rows: TokenizedRows
    sha256: str
    dataset_sha256: str
    skipped_count: int
    truncated_count: int
    earlier_count: int = 0
    thinking_count: int = 0
    unlearnt_count: int = 0

    @property
    def dataset_count(self) -> int:
        """Rows of the dataset that are learnt from."""
        return len(self.rows) - self.earlier_count


@dataclass(frozen=True, slots=True)
class TrainedTemplate:
    """The chat template that the trained model asks with, whatever it was trained from.

    `source` is None where the tokenizer's own stays. `thoughts` says what a prompt does with them: None for a
    template that knows none, "open" where the model may think, "closed" where the prompt asks for none. `end` is
    the token that closes an answer; `writes_more` tells that the template writes more behind it, which is not learnt.
    """

    source: str | None
    sha256: str
    thoughts: Literal["open", "closed"] | None
    end: str | None
    writes_more: bool = False


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on and what the loss is measured on."""

    train: RowSet
    validation: RowSet | None
    chat_template_sha256: str
    template: TrainedTemplate
