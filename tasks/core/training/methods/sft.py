"""Supervised fine-tuning: the answers of the rows are learnt, token by token."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.data.sources import DataId, described_data, training_rows, validation_rows
from tasks.core.errors import DataError
from tasks.core.prompts.tokens import PromptBuilder, TrainingRow
from tasks.core.training.methods.answer_loss import AnswerHead, summed_loss
from tasks.core.training.methods.base import Batch, BatchLoss, Collate, TrainingMethod
from tasks.core.training.methods.batches import Collator
from tasks.core.training.methods.packing import check_packing, pack
from tasks.core.training.methods.rows import (
    IGNORED_LABEL,
    RowSet,
    Sequences,
    TokenizedRows,
    TrainedTemplate,
    TrainingData,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from tasks.core.config import FineTunerConfig

logger = logging.getLogger(__name__)

_REASONS_SHOWN = 3


class SupervisedFineTuning(TrainingMethod):
    """Question and answer of a row as the chat template writes them; a target is a token of the answer.

    Rows may be packed. The head of the model is computed only where a token is learnt.
    """

    name: ClassVar[str] = "sft"

    def read(self, config: FineTunerConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
        """See the base class."""
        return read_training_data(config, tokenizer)

    def sequences(self, rows: TokenizedRows, config: FineTunerConfig) -> Sequences | None:
        """Packed rows, longest first."""
        return pack(rows.lengths, config.max_sequence_length) if config.packing else None

    def check_model(self, model: Any, config: FineTunerConfig) -> None:
        """Packed rows must not see each other."""
        if config.packing:
            check_packing(model)

    def collator(self, rows: TokenizedRows, sequences: Sequences | None, pad_token_id: int) -> Collate:
        """See `Collator`."""
        return Collator(rows, sequences, pad_token_id)

    def loss(self, model: Any) -> BatchLoss:
        """Sum of the targets' cross entropies in float32."""
        head = AnswerHead(model)

        def of_batch(model: Any, batch: Batch) -> torch.Tensor:
            places = batch.get("position_ids")
            logits = head.logits_at(model, batch["input_ids"], batch["positions"], places)
            return summed_loss(logits, batch["targets"])

        return of_batch


def read_training_data(config: FineTunerConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read and tokenise the training rows and, where set, the validation rows.

    A row that cannot be learnt from is left out, counted and reported. Raises DataError when a dataset or
    column is missing, or no row is left.
    """
    builder = PromptBuilder.for_learning(tokenizer, config, config.max_sequence_length)
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
