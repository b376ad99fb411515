"""From examples to token ids: prompts for inference, rows with labels for training.

Both come from the model's chat template through the same code, so a model is asked in exactly the
words that it learnt from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tasks.core.errors import TemplateError
from tasks.core.prompts.answer_spans import AnsweredText, AnswerFinder
from tasks.core.prompts.chat_template import ChatTemplate, Rendered, chat_template_sha256
from tasks.core.prompts.chat_tokenization import ChatTokenizer
from tasks.core.prompts.shortening import Turns, shorten
from tasks.core.prompts.thinking import Thinking
from tasks.core.records import Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.core.config import FineTunerConfig, InferencerConfig

__all__ = ["IGNORED_LABEL", "PromptBuilder", "TrainingRow", "chat_template_sha256"]

_log = logging.getLogger(__name__)

IGNORED_LABEL = -100
_EXAMPLES_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 8_000_000


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A tokenised conversation with its answer; `labels` is -100 where nothing is learnt.

    `problem` set means that the row cannot be learnt from, and the ids are empty. `is_earlier` marks the row of an
    earlier answer of a conversation whose last answer has a row of its own. `answers` are learnt in it,
    `lost_answers` were to be, but went with the oldest exchanges of a row that was too long.
    """

    id: str
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    truncated_tokens: int = 0
    problem: str | None = None
    is_earlier: bool = False
    has_thoughts: bool = False
    answers: int = 1
    lost_answers: int = 0


class _Encoded(NamedTuple):
    """Ids and labels of a row, the turns whose answers it teaches, and whether the last of them has thoughts."""

    ids: list[int]
    labels: list[int]
    turns: tuple[int, ...]
    has_thoughts: bool


class PromptBuilder:
    """Builds prompts and training rows for one tokenizer.

    A prompt has at most `max_sequence_length - reserve_tokens` tokens, a training row at most
    `max_sequence_length`. What is longer loses text from the left ("truncate_left"; see `fitting`) or
    becomes a row with a problem ("refuse"). A prompt that with its answer may be longer than `trained_tokens`,
    what the model is made for, is kept and warned of once. `chat_template_kwargs` go into every rendering. Raises
    TemplateError if the tokenizer's template is unusable.
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._template = ChatTemplate(tokenizer, chat_template_kwargs)
        self._tokenizer = ChatTokenizer(tokenizer)
        self._answers = AnswerFinder(self._template, question_part, answer_part)
        self._eos_id: int | None = tokenizer.eos_token_id
        self._bos_id: int | None = tokenizer.bos_token_id
        self._max_sequence_length = max_sequence_length
        self._reserve_tokens = reserve_tokens
        self._unwarned_tokens = trained_tokens
        self._refuses_long = str(long_prompts) == "refuse"
        self._train_on_responses_only = train_on_responses_only
        self._warn_about_template()

    @classmethod
    def for_learning(
        cls, tokenizer: PreTrainedTokenizerBase, settings: FineTunerConfig, max_sequence_length: int
    ) -> PromptBuilder:
        """Return the builder of the rows that a training with these settings learns."""
        return cls(
            tokenizer,
            max_sequence_length=max_sequence_length,
            long_prompts=settings.long_prompts,
            train_on_responses_only=settings.train_on_responses_only,
            question_part=settings.question_part,
            answer_part=settings.answer_part,
            chat_template_kwargs=settings.chat_template_kwargs,
        )

    @classmethod
    def for_asking(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        settings: InferencerConfig,
        max_sequence_length: int,
        trained_tokens: int | None,
    ) -> PromptBuilder:
        """Return the builder of the prompts that inference with these settings asks."""
        return cls(
            tokenizer,
            max_sequence_length=max_sequence_length,
            reserve_tokens=settings.max_new_tokens,
            trained_tokens=trained_tokens,
            long_prompts=settings.long_prompts,
            chat_template_kwargs=settings.chat_template_kwargs,
        )

    @property
    def chat_template_sha256(self) -> str:
        """Fingerprint (hex) of how conversations are written; equal in training and inference."""
        return self._template.sha256

    @property
    def begins_with_bos(self) -> bool:
        """Whether prompts begin with the tokenizer's start token."""
        ids = self._tokenizer.encode(
            self._template.render((Message("user", "a"),), add_generation_prompt=True)
        )
        return bool(ids) and ids[0] == self._bos_id

    @property
    def thinking(self) -> Thinking:
        """What the chat template does with thoughts: whether prompts leave them open, or close them."""
        return self._answers.thinking

    @property
    def template(self) -> ChatTemplate:
        """The chat template that prompts are written with."""
        return self._template

    def build(self, example: Example) -> Prompt:
        """The prompt of one example; what cannot be asked has `problem` set and no tokens."""
        return next(self.build_all((example,)))

    def build_all(self, examples: Iterable[Example]) -> Iterator[Prompt]:
        """`build` for many examples, lazily and several times faster."""
        for chunk in _chunks(examples, _EXAMPLES_AT_ONCE, self._template.own_characters):
            rendered = [self._try_rendering_prompt(example) for example in chunk]
            texts = [item for item in rendered if isinstance(item, Rendered)]
            encoded = iter(self._tokenizer.encode_all(texts))
            for example, item in zip(chunk, rendered, strict=True):
                if isinstance(item, Rendered):
                    yield self._fitted_prompt(example, next(encoded))
                else:
                    yield Prompt(example.id, (), problem=item)

    def training_rows(self, examples: Iterable[Example]) -> Iterator[TrainingRow]:
        """The rows to learn, lazily: at least one for each example.

        Each answer is learnt behind the prompt that inference would use. Earlier answers of a conversation are
        learnt in the same row where it begins with just that prompt and answer; otherwise, as with templates that
        rewrite earlier turns, they have rows of their own, behind the one of the last answer.
        """
        for chunk in _chunks(examples, _EXAMPLES_AT_ONCE, self._template.own_characters):
            for example, rows in self._encoded_rows(chunk, only_last=False):
                if isinstance(rows, str):
                    yield TrainingRow(example.id, problem=rows)
                    continue
                for number, row in enumerate(rows):
                    row_id = example.id if number == 0 else f"{example.id}/{row.turns[-1]}"
                    fitted = self._fitted_row(replace(example, id=row_id), row)
                    yield replace(fitted, is_earlier=number > 0)

    def reference_rows(self, examples: Iterable[Example]) -> Iterator[TrainingRow]:
        """One row for each example, with no other label than those of its reference."""
        for chunk in _chunks(examples, _EXAMPLES_AT_ONCE, self._template.own_characters):
            for example, rows in self._encoded_rows(chunk, only_last=True):
                if isinstance(rows, str):
                    yield TrainingRow(example.id, problem=rows)
                else:
                    yield self._fitted_row(replace(example, is_reference_learnt=True), rows[0])

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

    def _encoded_rows(
        self, chunk: Sequence[Example], *, only_last: bool
    ) -> Iterator[tuple[Example, list[_Encoded] | str]]:
        """Each example's rows, or the problem that keeps it from being learnt."""
        answered = [self._try_rendering_answers(example, only_last) for example in chunk]
        texts = [text for item in answered if not isinstance(item, str) for text in item]
        encoded = iter(self._encode_answers(texts))
        for example, item in zip(chunk, answered, strict=True):
            if isinstance(item, str):
                yield example, item
            else:
                rows = self._joined([(text, *next(encoded)) for text in item])
                yield example, rows if self._train_on_responses_only else [self._all_learnt(example, rows[0])]

    def _try_rendering_answers(self, example: Example, only_last: bool) -> list[AnsweredText] | str:
        if example.problem is not None:
            return example.problem
        if example.reference is None:
            return "the row has no reference answer to learn"
        if only_last:
            example = replace(example, is_reference_learnt=True)
        turns = _with_answer(example)
        try:
            found = self._answers.render_all(turns, only=turns[-1:] if only_last else None)
        except TemplateError as error:
            return error.what
        return found or "none of its answers is to be learnt"

    def _encode_answers(self, answered: Sequence[AnsweredText]) -> list[tuple[list[int], list[int]]]:
        """Ids of prompts and answers; where the template ends no turn, an EOS is put behind the answer."""
        encoded = self._tokenizer.encode_all_with_answers(
            [item.prompt for item in answered], [item.answer for item in answered]
        )
        for item, (_, ids) in zip(answered, encoded, strict=True):
            if not item.ends_turn and self._eos_id is not None:
                ids.append(self._eos_id)
        return encoded

    def _joined(self, answers: Sequence[tuple[AnsweredText, list[int], list[int]]]) -> list[_Encoded]:
        """Rows of answers, the last turn first; a row that begins with another prompt and answer teaches that too."""
        rows: list[_Encoded] = []
        for item, prompt, answer in answers:
            ids = prompt + answer
            for number, row in enumerate(rows):
                if row.ids[: len(ids)] == ids:
                    row.labels[len(prompt) : len(ids)] = answer
                    rows[number] = row._replace(turns=(item.turn, *row.turns))
                    break
            else:
                labels = [IGNORED_LABEL] * len(prompt) + answer
                rows.append(_Encoded(ids, labels, (item.turn,), item.has_thoughts))
        return rows

    def _all_learnt(self, example: Example, row: _Encoded) -> _Encoded:
        """The row with labels on its prompt too, though not on answers that are not to be learnt.

        Where the template rewrites such an answer, so that its place is not known, only answers are learnt.
        """
        turns = _with_answer(example)[: row.turns[-1] + 1]
        whole = row._replace(labels=list(row.ids))
        shown = [replace(turn, is_learnt=True) for turn in turns]
        only = [other for turn, other in zip(turns, shown, strict=True) if not turn.is_learnt]
        answered = self._answers.render_all(shown, only=only)
        for prompt, answer in self._encode_answers(answered):
            ids = prompt + answer
            if row.ids[: len(ids)] != ids:
                return row
            whole.labels[len(prompt) : len(ids)] = [IGNORED_LABEL] * len(answer)
        return whole

    def _fitted_row(self, example: Example, row: _Encoded) -> TrainingRow:
        limit = self._max_sequence_length
        if len(row.ids) <= limit:
            return self._training_row(example.id, row)
        problem = f"the row has {len(row.ids)} tokens, more than max_sequence_length {limit}"
        if self._refuses_long:
            return TrainingRow(example.id, problem=problem)
        turns = _with_answer(example)[: row.turns[-1] + 1]
        learnt = [turns[index] for index in row.turns]

        def encode(turns: Turns) -> tuple[_Encoded, int]:
            answered = self._answers.render_all(turns, only=learnt)
            encoded = zip(answered, self._encode_answers(answered), strict=True)
            shorter = self._joined([(item, *ids) for item, ids in encoded])[0]
            return shorter, len(shorter.ids)

        try:
            shorter = shorten(turns, encode, limit, self._tokenizer)
        except TemplateError as error:
            return TrainingRow(example.id, problem=error.what)
        if shorter is None:
            return TrainingRow(example.id, problem=f"{problem}, even without the question's text")
        fitted, length = shorter
        lost = len(row.turns) - len(fitted.turns)
        return replace(
            self._training_row(example.id, fitted), truncated_tokens=len(row.ids) - length, lost_answers=lost
        )

    def _training_row(self, row_id: str, row: _Encoded) -> TrainingRow:
        return TrainingRow(
            row_id,
            tuple(row.ids),
            tuple(row.labels),
            has_thoughts=row.has_thoughts,
            answers=len(row.turns),
        )

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
        unread = [name for name in self._template.variables if not self._template.reads(name)]
        if unread:
            _log.warning("The chat template reads no variable %s of chat_template_kwargs.", ", ".join(unread))
        if self._template.unknown_end is not None:
            _log.warning(
                "The chat template ends an answer with %r, which is no token of this model's tokenizer: the end of "
                "texts is learnt and looked for instead. Set chat_template to one that is made of tokens that the "
                "model has.",
                self._template.unknown_end,
            )


def _with_answer(example: Example) -> Turns:
    assert example.reference is not None
    answer = Message("assistant", example.reference, example.reference_reasoning, example.is_reference_learnt)
    return (*example.conversation, answer)


def _chunks(examples: Iterable[Example], size: int, own_characters: int) -> Iterator[list[Example]]:
    """Lists of up to `size` examples, fewer where they, or what the template adds to each, are long."""
    chunk: list[Example] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += sum(len(turn.content) for turn in example.conversation) + len(example.reference or "")
        characters += own_characters
        if len(chunk) == size or characters > _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
