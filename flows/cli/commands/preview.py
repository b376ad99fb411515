"""`tuneproof preview`: the first prompts; what is learnt in green, or between marks where there are no colours."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import prepare

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.prompts.preview import Preview, PreviewedRow

_LEARNT, _SPECIAL, _LEARNT_SPECIAL = "bold green", "magenta", "bold cyan"


def preview(
    config: ConfigPath = None,
    /,
    *,
    rows: Annotated[
        int, Parameter(help="How many rows of each section.", validator=validators.Number(gte=1))
    ] = 3,
    settings: Settings = None,
) -> None:
    """Show the first prompts with their special tokens, and what is learnt of them; loads no weights."""
    loaded = prepare(config, NO_COMMON, settings)
    _check_data(loaded)
    from tasks.previewing import preview as previews_of

    show_previews(previews_of(loaded, rows))


def _check_data(config: Config) -> None:
    """Refuse data that is not there before libraries are loaded that take seconds."""
    from tasks.core.data.sources import check_source

    for data_id in (config.fine_tuner.training_data_id, config.inferencer.testing_data_id):
        if data_id is not None:
            check_source(data_id)


def show_previews(previews: Iterable[Preview]) -> None:
    """Print each section: what is in force, then its rows."""
    from rich.console import Console
    from rich.text import Text

    from tasks.core.prompts.preview import marked_text, row_in_words, written_out

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

    from tasks.core.prompts.preview import written_out

    text = Text()
    for piece in row.pieces:
        style = _LEARNT_SPECIAL if piece.is_special else _LEARNT
        plain = _SPECIAL if piece.is_special else "dim"
        text.append(written_out(piece.text), style if piece.is_learnt else plain)
    return text
