"""Questions made of several columns: `{instruction}` and, where there is one, `{input}` below it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class _Column:
    name: str


_Line = list[str | _Column]


@dataclass(frozen=True, slots=True)
class QuestionTemplate:
    """A text with names of columns in braces; a brace itself is written twice."""

    text: str
    paragraphs: tuple[tuple[_Line, ...], ...]
    """Lines by paragraph; blank lines are paragraphs of their own."""

    @classmethod
    def parse(cls, text: str) -> QuestionTemplate:
        """Raise ValueError for a brace that is not closed, a name that is empty, or no column at all."""
        lines: list[_Line] = [[]]
        for token in _TOKEN.findall(text):
            if token in ("{{", "}}"):
                lines[-1].append(token[0])
            elif token in ("{", "}"):
                raise ValueError(f"has a single {token}: write {token}{token} for the character itself")
            elif token.startswith("{"):
                if not token[1:-1].strip():
                    raise ValueError("has {} without the name of a column")
                lines[-1].append(_Column(token[1:-1]))
            else:
                first, *others = token.split("\n")
                lines[-1].append(first)
                lines.extend([other] for other in others)
        if not any(map(_has_column, lines)):
            raise ValueError("names no column, such as {instruction}")
        paragraphs: list[list[_Line]] = []
        was_written: bool | None = None
        for line in lines:
            if (is_written := _is_written(line)) != was_written:
                paragraphs.append([])
            paragraphs[-1].append(line)
            was_written = is_written
        return cls(text, tuple(map(tuple, paragraphs)))

    @classmethod
    def of_columns(cls, names: Sequence[str]) -> QuestionTemplate:
        """The columns below one another, with a blank line between them."""
        return cls.parse("\n\n".join(f"{{{name}}}" for name in names))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, each once, in the order of their first place."""
        lines = (line for paragraph in self.paragraphs for line in paragraph)
        return tuple(
            dict.fromkeys(token.name for line in lines for token in line if isinstance(token, _Column))
        )

    def fill(self, texts: Mapping[str, str]) -> str:
        """The question with these texts; an empty one takes its line, and a paragraph of empty ones goes whole."""
        if not any(texts.values()):
            return ""
        if all(texts.values()):
            return "\n".join(_filled(line, texts) for paragraph in self.paragraphs for line in paragraph)
        kept: list[str] = []
        gap: list[str] = []  # the blank lines since what was kept last
        for paragraph in self.paragraphs:
            if not any(map(_is_written, paragraph)):
                gap = [""] * len(paragraph) if kept else []
            elif any(_has_text(line, texts) for line in paragraph) or not any(map(_has_column, paragraph)):
                lines = [line for line in paragraph if _has_text(line, texts) or not _has_column(line)]
                kept += [*gap, *(_filled(line, texts).rstrip() for line in lines)]
                gap = []
        return "\n".join(kept)


def _has_column(line: _Line) -> bool:
    return any(isinstance(token, _Column) for token in line)


def _is_written(line: _Line) -> bool:
    return any(isinstance(token, _Column) or token.strip() for token in line)


def _filled(line: _Line, texts: Mapping[str, str]) -> str:
    return "".join(texts[token.name] if isinstance(token, _Column) else token for token in line)


def _has_text(line: _Line, texts: Mapping[str, str]) -> bool:
    return any(isinstance(token, _Column) and texts[token.name] for token in line)
