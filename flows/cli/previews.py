"""Prints previews: what is learnt in green, special tokens in colour, and without colours between marks."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tasks.core.prompts.preview import Preview, PreviewedRow, marked_text, row_in_words, written_out

_LEARNT, _SPECIAL, _LEARNT_SPECIAL = "bold green", "magenta", "bold cyan"


def show_previews(previews: Iterable[Preview]) -> None:
    """Print each section: what is in force, then its rows."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for preview in previews:
        console.print(Text(preview.name, style="bold"))
        for label, text in preview.facts:
            console.print(Text(f"  {label}: {written_out(text)}"))
        for row in preview.rows:
            console.print(Text(f"\n  row {row.id}: {row_in_words(row)}", style="bold"))
            if row.problem is None:
                console.print(_coloured(row) if console.color_system else Text(marked_text(row)))
        console.print()
    if console.color_system:
        legend = Text("learnt", style=_LEARNT)
        console.print(legend.append("  "), Text("special token", style=_SPECIAL), " ",
                      Text("special token, learnt", style=_LEARNT_SPECIAL), "  not learnt")  # fmt: skip
    else:
        console.print(Text("What stands between ⟦ and ⟧ is learnt."))


def _coloured(row: PreviewedRow) -> object:
    from rich.text import Text

    text = Text()
    for piece in row.pieces:
        style = _LEARNT_SPECIAL if piece.is_special else _LEARNT
        plain = _SPECIAL if piece.is_special else "dim"
        text.append(written_out(piece.text), style if piece.is_learnt else plain)
    return text
