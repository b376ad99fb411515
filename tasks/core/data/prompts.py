"""From examples to token ids: prompts for inference, rows with labels for training.

Both come from the model's chat template through the same code, so a model is asked in exactly the
words that it learnt from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

from tasks.core.data.answer_spans import AnsweredText, AnswerFinder
from tasks.core.data.chat_template import ChatTemplate, Rendered, chat_template_sha256
from tasks.core.data.chat_tokenization import ChatTokenizer
from tasks.core.data.fitting import Turns, shorten
from tasks.core.errors import TemplateError
from tasks.core.records import Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "PromptBuilder", "TrainingRow", "chat_template_sha256"]

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

IGNORED_LABEL = -100
_EXAMPLES_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A tokenised conversation with its answer; `labels` is -100 where nothing is learnt.

    `problem` set means that the row cannot be learnt from, and the ids are empty.
    """

    id: str
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    truncated_tokens: int = 0
    problem: str | None = None


class PromptBuilder:
    """Builds prompts and training rows for one tokenizer.

    A prompt has at most `max_sequence_length - reserve_tokens` tokens, a training row at most
    `max_sequence_length`. What is longer loses text from the left ("truncate_left"; see `fitting`) or
    becomes a row with a problem ("refuse"). A prompt that with its answer may be longer than `trained_tokens`,
    what the model is made for, is kept and warned of once. Raises TemplateError if the tokenizer's template is
    unusable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_sequence_length: int,
        reserve_tokens: int = 0,
        trained_tokens: int | None = None,
        long_prompts: Literal["truncate_left", "refuse"] = "truncate_left",
        train_on_responses_only: bool = True,
        question_part: str | None = None,
        answer_part: str | None = None,
    ) -> None:
        self._template = ChatTemplate(tokenizer)
        self._tokenizer = ChatTokenizer(tokenizer)
        self._answers = AnswerFinder(self._template, question_part, answer_part)
        self._eos_id: int | None = tokenizer.eos_token_id
        self._max_sequence_length = max_sequence_length
        self._reserve_tokens = reserve_tokens
        self._unwarned_tokens = trained_tokens
        self._refuses_long = str(long_prompts) == "refuse"
        self._train_on_responses_only = train_on_responses_only
        self._warn_about_template()

    @property
    def chat_template_sha256(self) -> str:
        """Fingerprint (hex) of how conversations are written; equal in training and inference."""
        return self._template.sha256

    @property
    def uses_plain_template(self) -> bool:
        """True if the model has no chat template and a plain one is used."""
        return self._template.is_plain

    def build(self, example: Example) -> Prompt:
        """The prompt of one example; what cannot be asked has `problem` set and no tokens."""
        return next(self.build_all((example,)))

    def build_all(self, examples: Iterable[Example]) -> Iterator[Prompt]:
        """`build` for many examples, lazily and several times faster."""
        for chunk in _chunks(examples, _EXAMPLES_AT_ONCE):
            rendered = [self._try_rendering_prompt(example) for example in chunk]
            texts = [item for item in rendered if isinstance(item, Rendered)]
            encoded = iter(self._tokenizer.encode_all(texts))
            for example, item in zip(chunk, rendered, strict=True):
                if isinstance(item, Rendered):
                    yield self._fitted_prompt(example, next(encoded))
                else:
                    yield Prompt(example.id, (), problem=item)

    def training_row(self, example: Example) -> TrainingRow:
        """Token ids and labels of one example; what cannot be learnt has `problem` set."""
        return next(self.training_rows((example,)))

    def training_rows(self, examples: Iterable[Example]) -> Iterator[TrainingRow]:
        """`training_row` for many examples, lazily and several times faster."""
        for chunk in _chunks(examples, _EXAMPLES_AT_ONCE):
            answered = [self._try_rendering_answer(example) for example in chunk]
            encoded = iter(self._label_all([item for item in answered if isinstance(item, AnsweredText)]))
            for example, item in zip(chunk, answered, strict=True):
                if isinstance(item, AnsweredText):
                    yield self._fitted_row(example, next(encoded))
                else:
                    yield TrainingRow(example.id, problem=item)

    # --- prompts

    def _try_rendering_prompt(self, example: Example) -> Rendered | str:
        """The rendered prompt, or the problem that keeps the row from being asked."""
        if example.problem is not None:
            return example.problem
        try:
            return self._template.render(example.conversation, add_generation_prompt=True)
        except TemplateError as error:
            return error.what

    def _encode_prompt(self, turns: Turns) -> tuple[list[int], int]:
        ids = self._tokenizer.encode(self._template.render(turns, add_generation_prompt=True))
        return ids, len(ids)

    def _fitted_prompt(self, example: Example, ids: list[int]) -> Prompt:
        limit = self._max_sequence_length - self._reserve_tokens
        if len(ids) <= limit:
            self._warn_beyond_training(len(ids))
            return Prompt(example.id, tuple(ids))
        room = f"max_sequence_length {self._max_sequence_length}"
        if self._reserve_tokens:
            room += f" less {self._reserve_tokens} for the answer"
        problem = f"the prompt has {len(ids)} tokens, more than the {limit} that fit ({room})"
        if self._refuses_long:
            return Prompt(example.id, (), problem=problem)
        try:
            shorter = shorten(example.conversation, self._encode_prompt, limit, self._tokenizer)
        except TemplateError as error:
            return Prompt(example.id, (), problem=error.what)
        if shorter is None:
            return Prompt(example.id, (), problem=f"{problem}, even without the question's text")
        fitted, length = shorter
        self._warn_beyond_training(length)
        return Prompt(example.id, tuple(fitted), truncated_tokens=len(ids) - length)

    def _warn_beyond_training(self, length: int) -> None:
        trained = self._unwarned_tokens
        if trained is not None and length + self._reserve_tokens > trained:
            self._unwarned_tokens = None
            _log.warning(
                "A prompt of %d tokens and up to %d of its answer are more than the %d that the model is made for; "
                "answers beyond them may be poor. Lower max_sequence_length to %d to have such prompts cut.",
                length, self._reserve_tokens, trained, trained,
            )  # fmt: skip

    # --- training rows

    def _try_rendering_answer(self, example: Example) -> AnsweredText | str:
        if example.problem is not None:
            return example.problem
        if example.reference is None:
            return "the row has no reference answer to learn"
        try:
            return self._answers.render(_with_answer(example))
        except TemplateError as error:
            return error.what

    def _label_all(self, answered: Sequence[AnsweredText]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels; where the template ends no turn, an EOS is put behind the last answer."""
        cuts = [[place for span in item.spans for place in span] for item in answered]
        encoded = self._tokenizer.encode_all_with_cuts([item.rendered for item in answered], cuts)
        labelled = []
        for item, (ids, indices) in zip(answered, encoded, strict=True):
            if not item.ends_turn and self._eos_id is not None:
                ids.append(self._eos_id)
                indices[-1] = len(ids)
            labels = ids
            if self._train_on_responses_only:
                labels = [IGNORED_LABEL] * len(ids)
                for start, end in zip(indices[::2], indices[1::2], strict=True):
                    labels[start:end] = ids[start:end]
            labelled.append((ids, labels))
        return labelled

    def _encode_row(self, turns: Turns) -> tuple[tuple[list[int], list[int]], int]:
        (row,) = self._label_all([self._answers.render(turns)])
        return row, len(row[0])

    def _fitted_row(self, example: Example, row: tuple[list[int], list[int]]) -> TrainingRow:
        ids, labels = row
        limit = self._max_sequence_length
        if len(ids) <= limit:
            return TrainingRow(example.id, tuple(ids), tuple(labels))
        problem = f"the row has {len(ids)} tokens, more than max_sequence_length {limit}"
        if self._refuses_long:
            return TrainingRow(example.id, problem=problem)
        try:
            shorter = shorten(_with_answer(example), self._encode_row, limit, self._tokenizer)
        except TemplateError as error:
            return TrainingRow(example.id, problem=error.what)
        if shorter is None:
            return TrainingRow(example.id, problem=f"{problem}, even without the question's text")
        (short_ids, short_labels), length = shorter
        return TrainingRow(example.id, tuple(short_ids), tuple(short_labels), len(ids) - length)

    def _warn_about_template(self) -> None:
        if self._template.is_plain:
            _log.warning(
                "The model has no chat template; a plain one is used (System: … Question: … Answer:). "
                "A base model answers such prompts poorly until it is fine-tuned with them."
            )
        if self._template.folds_system:
            _log.warning(
                "The chat template takes no system message; its text is put before the first user message."
            )


def _with_answer(example: Example) -> Turns:
    assert example.reference is not None
    answer = Message("assistant", example.reference, example.reference_reasoning, example.is_reference_learnt)
    return (*example.conversation, answer)


def _chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
