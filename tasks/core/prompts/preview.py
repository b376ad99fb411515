"""What a model is given and what it learns, to look at before training: rows in pieces, and what is in force.

A piece is a run of tokens that are learnt alike and are all special or all text. Weights are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.prompts.tokens import IGNORED_LABEL, PromptBuilder, TrainingRow
from tasks.core.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_PIECE = 1200


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of tokens that belong together. `is_special`: markers of the template and other control tokens."""

    text: str
    is_learnt: bool
    is_special: bool


@dataclass(frozen=True, slots=True)
class PreviewedRow:
    """A row as the model gets it; `problem` says why it is not asked or learnt, and there are no pieces then."""

    id: str
    pieces: tuple[Piece, ...] = ()
    token_count: int = 0
    learnt_tokens: int = 0
    truncated_tokens: int = 0
    is_earlier: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """One section: what is in force (label, text), and the first rows."""

    name: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[PreviewedRow, ...]


def template_facts(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, source: str, config_dir: Path | None
) -> Iterator[tuple[str, str]]:
    """What the chat template does. `source` says where it is from; `config_dir` may hold a generation config."""
    template = builder.template
    yield "chat template", "a plain one, since the model has none" if template.is_plain else source
    if template.variables:
        told = ", ".join(f"{name} = {value!r}" for name, value in template.variables.items())
        yield "chat_template_kwargs", told
    if template.folds_system:
        yield "system prompt", "the template takes none: it is put before the first question"
    if tokenizer.bos_token is not None:
        first = tokenizer.bos_token if builder.begins_with_bos else "none: the model's prompts have none"
        yield "first token", str(first)
    yield "an answer ends with", ", ".join(_ends(builder, tokenizer, config_dir)) or "nothing that is known"
    thinking = builder.thinking
    yield "thoughts", thinking.in_words or "the template knows none"


def _ends(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, config_dir: Path | None
) -> Iterator[str]:
    """Each end once, with its id and who names it."""
    named: dict[int, list[str]] = {}
    turn_end = builder.template.turn_end_id
    if turn_end is not None:
        named.setdefault(turn_end, []).append("chat template")
    for token_id in _configured_ends(config_dir):
        named.setdefault(token_id, []).append("generation config")
    if tokenizer.eos_token_id is not None:
        named.setdefault(int(tokenizer.eos_token_id), []).append("tokenizer")
    for token_id, by in named.items():
        yield f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id}; {' and '.join(by)})"


def _configured_ends(config_dir: Path | None) -> list[int]:
    from transformers import GenerationConfig

    if config_dir is None or not (config_dir / "generation_config.json").is_file():
        return []
    found = GenerationConfig.from_pretrained(str(config_dir)).eos_token_id
    return [int(token_id) for token_id in ([found] if isinstance(found, int) else found or ())]


def training_rows(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], count: int
) -> tuple[PreviewedRow, ...]:
    """The rows that the first `count` examples give; rows of earlier answers follow the one of the last."""
    return tuple(_learnt(tokenizer, row) for row in builder.training_rows(islice(examples, count)))


def inference_rows(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], count: int
) -> tuple[PreviewedRow, ...]:
    """The prompts of the first `count` examples."""
    return tuple(
        PreviewedRow(
            prompt.id,
            _pieces(tokenizer, prompt.token_ids, [IGNORED_LABEL] * len(prompt.token_ids)),
            len(prompt.token_ids),
            truncated_tokens=prompt.truncated_tokens,
            problem=prompt.problem,
        )
        for prompt in builder.build_all(islice(examples, count))
    )


def _learnt(tokenizer: PreTrainedTokenizerBase, row: TrainingRow) -> PreviewedRow:
    labels = (IGNORED_LABEL, *row.labels[1:])  # nothing comes before the first token, so nothing predicts it
    return PreviewedRow(
        row.id,
        _pieces(tokenizer, row.input_ids, labels[: len(row.input_ids)]),
        len(row.input_ids),
        sum(label != IGNORED_LABEL for label in labels),
        row.truncated_tokens,
        row.is_earlier,
        row.problem,
    )


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> tuple[Piece, ...]:
    special = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in (tokenizer.chat_template or "")
    }
    kinds = zip(ids, ((label != IGNORED_LABEL, token in special) for token, label in zip(ids, labels, strict=True)),
                strict=True)  # fmt: skip
    # Each piece is what it adds to the text before it: alone, a token may lose its blank or half of a character.
    pieces: list[Piece] = []
    before, count = "", 0
    for (is_learnt, is_special), tokens in groupby(kinds, key=lambda item: item[1]):
        count += sum(1 for _ in tokens)
        text = str(
            tokenizer.decode(list(ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        shared = _shared_length(before, text)
        pieces.append(Piece(_shortened(text[shared:]), is_learnt, is_special))
        before = text
    return tuple(pieces)


def _shared_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


def _shortened(text: str) -> str:
    """Long texts lose their middle, which is told."""
    if len(text) <= _LONGEST_PIECE:
        return text
    half = _LONGEST_PIECE // 2
    return f"{text[:half]} [… {len(text) - 2 * half:,} characters …] {text[-half:]}"


def marked_text(row: PreviewedRow) -> str:
    """The row as text in which what is learnt stands between ⟦ and ⟧, and control characters are written out."""
    parts = []
    for is_learnt, pieces in groupby(row.pieces, key=lambda piece: piece.is_learnt):
        text = written_out("".join(piece.text for piece in pieces))
        parts.append(f"⟦{text}⟧" if is_learnt else text)
    return "".join(parts)


def written_out(text: str) -> str:
    """The text with control characters but line breaks as escapes, so that none reaches a terminal."""
    return "".join(
        character
        if character == "\n" or character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def markdown(previews: Iterable[Preview]) -> str:
    """For an artifact: facts as a list, rows as code, what is learnt between ⟦ and ⟧."""
    lines: list[str] = []
    for preview in previews:
        lines += [f"## {preview.name.capitalize()}", ""]
        lines += [f"- **{label}**: {text}" for label, text in preview.facts]
        for row in preview.rows:
            lines += ["", f"Row `{row.id}`: {row_in_words(row)}", ""]
            if row.problem is None:
                runs = re.findall("`+", marked_text(row))
                fence = "`" * max(3, 1 + max(map(len, runs), default=0))
                lines += [f"{fence}text", marked_text(row), fence]
        lines.append("")
    return "\n".join(lines)


def row_in_words(row: PreviewedRow) -> str:
    """Its tokens, or what is wrong with it."""
    if row.problem is not None:
        return f"left out: {row.problem}"
    told = f"{row.token_count:,} tokens"
    told += f", {row.learnt_tokens:,} of them learnt" if row.learnt_tokens else ""
    told += f", {row.truncated_tokens:,} cut from the left" if row.truncated_tokens else ""
    return told + (", an earlier answer of the conversation above" if row.is_earlier else "")
