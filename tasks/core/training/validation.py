"""Which checkpoint is the best by its validation loss, and when no better one is expected.

Both are read from the trainer's log, which each checkpoint holds, so a resumed training decides as an undisturbed
one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Validated:
    """The mean validation loss per learnt token after `step` updates."""

    step: int
    loss: float


def best_validation(log_history: Sequence[dict[str, Any]]) -> Validated | None:
    """The lowest validation loss after at least one update, the earliest of equal ones; None without validation."""
    return min(_validations(log_history), key=lambda validated: validated.loss, default=None)


def untrained_loss(log_history: Sequence[dict[str, Any]]) -> float | None:
    """The validation loss before the first update."""
    return next(
        (entry["eval_loss"] for entry in log_history if "eval_loss" in entry and not entry["step"]), None
    )


def is_exhausted(log_history: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` validations were all no better than the best before them; never for None."""
    best = best_validation(log_history)
    if patience is None or best is None:
        return False
    return sum(validated.step > best.step for validated in _validations(log_history)) >= patience


def _validations(log_history: Sequence[dict[str, Any]]) -> list[Validated]:
    found = {int(entry["step"]): float(entry["eval_loss"]) for entry in log_history if "eval_loss" in entry}
    return [Validated(step, loss) for step, loss in sorted(found.items()) if step > 0]
