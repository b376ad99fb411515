"""Training rows, tokenised and kept small: four bytes a token, so a million rows stay in memory."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.data.sources import DataId, described_data, training_rows, validation_rows
from tasks.core.errors import DataError
from tasks.core.prompts.tokens import PromptBuilder, TrainingRow

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from tasks.core.config import FineTunerConfig

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
_REASONS_SHOWN = 3

Tokens = NDArray[np.int32]


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


def read_training_data(config: FineTunerConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read and tokenise the training rows and, where set, the validation rows.

    A row that cannot be learnt from is left out, counted and reported. Raises DataError when a dataset or
    column is missing, or no row is left.
    """
    builder = PromptBuilder(
        tokenizer,
        max_sequence_length=config.max_sequence_length,
        long_prompts=config.long_prompts,
        train_on_responses_only=config.train_on_responses_only,
        question_part=config.question_part,
        answer_part=config.answer_part,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    train = _read(config, builder, training_rows(config), config.required_training_data_id)
    validation, validation_id = None, config.validation_data_id
    if validation_id is not None:
        validation = _read(config, builder, validation_rows(config, validation_id), validation_id)
    template = trained_template(builder, train)
    return TrainingData(train, validation, template.sha256, template)


def trained_template(builder: PromptBuilder, rows: RowSet) -> TrainedTemplate:
    """Choose what the trained model's prompts do with thoughts, as most of its rows have it; the log says so."""
    thinking, own = builder.thinking, builder.template
    with_thoughts, without = rows.thinking_count, len(rows.rows) - rows.thinking_count
    closes = thinking.may_think and without > with_thoughts
    chosen = (thinking.closed if closes else own).keeping_variables()
    thoughts: Literal["open", "closed"] | None = None
    if closes or thinking.is_closed:
        thoughts = "closed"
    elif thinking.may_think or with_thoughts:
        thoughts = "open"
    if thoughts is not None:
        logger.info(
            "thoughts: %d rows of %s are learnt with them, %d without, behind a prompt that asks for none; "
            "the trained model is asked %s",
            *(with_thoughts, rows.data_id, without),
            "to think" if thoughts == "open" else "for answers without thoughts",
        )
    kept = own.is_plain or chosen.source == own.source
    source = None if kept else chosen.source
    writes_more = own.answer_tail.strip() != (own.turn_end or "")
    return TrainedTemplate(source, chosen.sha256, thoughts, own.turn_end, writes_more)


def _read(config: FineTunerConfig, builder: PromptBuilder, dataset: Dataset, data_id: DataId) -> RowSet:
    mapping = ColumnMapping.of(config.model_dump())
    count = _Count()
    rows = TokenizedRows(
        (row.input_ids, row.labels)
        for row in builder.training_rows(examples(dataset, mapping))
        if count.takes(row)
    )
    described = described_data(data_id)
    count.report(described, len(rows))
    return RowSet(
        described,
        rows,
        count.sha256,
        count.dataset_sha256,
        count.skipped,
        count.truncated,
        count.earlier,
        count.thinking,
        count.unlearnt,
    )


def _fingerprint(ids: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


@dataclass(slots=True)
class _Count:
    """Counts rows as they pass, keeps the first reasons and fingerprints what is learnt."""

    skipped: int = 0
    truncated: int = 0
    earlier: int = 0
    thinking: int = 0
    unlearnt: int = 0
    reasons: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    skipped_ids: dict[int, str] = field(default_factory=dict)  # by place in the dataset

    @property
    def sha256(self) -> str:
        """Fingerprint (hex) of the rows that are learnt, in order; ids carry the content."""
        return _fingerprint(self.ids)

    @property
    def dataset_sha256(self) -> str:
        """Fingerprint (hex) of all rows of the dataset, in order."""
        learnt, places = iter(self.ids), range(len(self.ids) + len(self.skipped_ids))
        return _fingerprint(self.skipped_ids[at] if at in self.skipped_ids else next(learnt) for at in places)

    def takes(self, row: TrainingRow) -> bool:
        problem = row.problem
        if problem is None and all(label == IGNORED_LABEL for label in row.labels[1:]):
            problem = "nothing of the answer is left to learn"
        if problem is not None:
            self.unlearnt += row.is_earlier
            if not row.is_earlier:
                self.skipped_ids[len(self.ids) + self.skipped] = row.id
                self.skipped += 1
            if len(self.reasons) < _REASONS_SHOWN and not row.is_earlier:
                self.reasons.append(f"{row.id}: {problem}")
            return False
        self.truncated += row.truncated_tokens > 0
        self.earlier += row.is_earlier
        self.thinking += row.has_thoughts
        self.unlearnt += row.lost_answers
        if not row.is_earlier:
            self.ids.append(row.id)
        return True

    def report(self, data_id: str, usable: int) -> None:
        """Log what was left out or cut; DataError when nothing is left."""
        listed = "".join(f"\n    row {reason}" for reason in self.reasons)
        if usable == 0:
            raise DataError(
                f"no row of {data_id} can be learnt from; the first of {self.skipped}:{listed}",
                "correct the data, or set question_column and ground_truth_column to the right columns",
            )
        if self.skipped:
            logger.warning(
                "%d of %d rows of %s are left out; the first reasons:%s",
                *(self.skipped, self.skipped + usable, data_id, listed),
            )
        if self.truncated:
            logger.warning(
                "%d of %d rows of %s are longer than max_sequence_length; text was cut from their left",
                *(self.truncated, usable, data_id),
            )
        if self.earlier:
            logger.info(
                "%d earlier answers in conversations of %s are learnt as rows of their own, "
                "each behind the prompt that asks for it",
                *(self.earlier, data_id),
            )
        if self.unlearnt:
            logger.warning(
                "%d earlier answers in conversations of %s are not learnt: with their prompts they are longer than "
                "max_sequence_length",
                *(self.unlearnt, data_id),
            )
