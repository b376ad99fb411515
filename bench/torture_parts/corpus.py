"""The corpus: hostile rows, files, names, models and templates, each of which must have the outcome that is stated."""

from __future__ import annotations

import functools
import json
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.checks.rows import Bench, Row
from bench.torture_parts import works
from bench.torture_parts.stage import Stage, last_line, seen_harm
from bench.torture_parts.trials import Clock, Ended, Harm, Tally, command, source_of

if TYPE_CHECKING:
    from tests.hostile.items import Item

PART = "corpus"
_MORE_BYTES = 4 << 30
_PATIENCE_SECONDS = 40.0
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Try all items (in a short run those that are not slow) in an order that the seed gives; one row for each kind."""
    from tests.hostile import files, models, names, rows, templates

    stage, source, clock = (
        Stage(bench.folder / "stage"),
        source_of(bench, PART),
        Clock(bench, share, short_turns=10),
    )
    kinds = {
        module.__name__.rpartition(".")[2]: module.ITEMS for module in (rows, files, names, models, templates)
    }
    items = [
        (kind, item) for kind, there in kinds.items() for item in there if not (bench.tiny and item.slow)
    ]
    source.shuffle(items)
    tallies = {kind: Tally(PART, f"hostile {kind}") for kind in kinds}
    for kind, item in items:
        if not clock.has_turn():
            break
        tallies[kind].count(tried(stage, item), what=item.name)
    for kind, tally in tallies.items():
        yield tally.row(f"{tally.trials} of {len(kinds[kind])} items had the stated outcome")


def tried(stage: Stage, item: Item) -> Harm:
    """Let `infer` meet an item; anything but its stated outcome is harm."""
    from tests.hostile.items import MARKER

    place = stage.folder / "item"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    overrides = item.make(place, stage.model_dir)
    ended = command(
        functools.partial(_infer, stage, place, overrides), stage.log_path, before=_bounded,
        patience_seconds=_PATIENCE_SECONDS,
    )  # fmt: skip
    harm = seen_harm(ended)
    if (place / MARKER).exists():
        harm.silently_wrong, harm.notes = 1, [*harm.notes, "code of it was run"]
    if _CONTROL.search(ended.told):
        harm.silently_wrong, harm.notes = (
            1,
            [*harm.notes, f"control characters were printed: {last_line(ended)!r}"],
        )
    if not harm.any:
        wrong = _unlike(item, place, ended)
        harm = Harm(silently_wrong=1, notes=[wrong]) if wrong else harm
    return harm


def _infer(stage: Stage, place: Path, overrides: dict[str, Any]) -> None:
    rows_path = stage.folder / "two.jsonl"
    _write_two(rows_path)
    given = {"inferencer.testing_data_id": str(rows_path), "inferencer.score_references": False}
    works.infer(stage, place, **(given | overrides))


def _write_two(path: Path) -> None:
    from tests.hostile.items import SOUND

    if not path.exists():
        path.write_text(json.dumps(SOUND) + "\n" + json.dumps(SOUND) + "\n")


def _bounded() -> None:
    """Let one item take some memory and no more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MORE_BYTES, resource.RLIM_INFINITY))


def _unlike(item: Item, place: Path, ended: Ended) -> str | None:
    """Say how an item's outcome differs from what is stated, or None."""
    outputs = list(place.glob("runs/*/inferencer_output.jsonl"))
    errors: list[str | None] = []
    if outputs:
        errors = [json.loads(row)["error"] for row in outputs[0].read_bytes().split(b"\n") if row]
    if ended.code != 0 and not ended.is_refusal:
        return f"ended with {ended.code}: {last_line(ended)}"
    found = "refused" if ended.code else "error rows" if any(errors) else "answered"
    if found != item.outcome:
        return f"{found}, not {item.outcome}: {next(filter(None, errors), last_line(ended))[:200]}"
    texts = [ended.told] if found == "refused" else [error for error in errors if error]
    if item.says and not all(re.search(item.says, text) for text in texts):
        return f"does not say {item.says!r}: {texts[0][:200]}"
    return None
