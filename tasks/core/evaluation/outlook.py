"""Before a run: what its rows can show, and which checks of the gate they cannot decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.nights import allowed_p_value
from tasks.core.evaluation.wording import label

if TYPE_CHECKING:
    from tasks.core.config import GateConfig

# Shares of rows on which two models differ, by experience; a plan has no answers to count them in.
_CHANGED_BY_TRAINING = 0.3
_CHANGED_IN_A_GUARD = 0.1


def outlook(
    rows: int, settings: GateConfig, guards: Sequence[str], confidence: float, *, has_champion: bool
) -> Iterator[str]:
    """Sentences about a 0/1 primary metric and the named guards on this many rows with different questions."""
    if rows < settings.minimum_rows:
        yield (
            f"{rows:,} rows are fewer than gate.minimum_rows = {settings.minimum_rows:,}: "
            "the verdict can only be reject or inconclusive"
        )
    against = "champion" if has_champion else "base"
    allowed = allowed_p_value(1, settings.challenges, confidence, "champion" if has_champion else "base")
    shown = stats.paired_difference_shown(rows, _CHANGED_BY_TRAINING, allowed)
    yield (
        f"{rows:,} rows show a true gain of {100 * shown:.1f} points over the {against} in 4 of 5 cases "
        f"(p at most {allowed:.2g}; where the models differ on 3 rows of 10)"
    )
    margin = settings.non_inferiority_margin
    for name in guards:
        if margin <= 0:
            yield f"{label(name)}: with a margin of 0 only a guard of which no row is worse passes"
            continue
        needed = stats.paired_rows_needed(margin, _CHANGED_IN_A_GUARD, 1 - confidence)
        told = f"that {label(name)} does not fall by {100 * margin:g} points needs about {needed:,} rows"
        short = ": too few here, so it may stay open" if needed > rows else ""
        yield f"{told} (where the models differ on 1 row of 10){short}"
