"""What a generation engine must do, and the row that it gives.

An engine takes requests from a queue and yields rows as they finish. It knows nothing of files, retries or runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tasks.core.generation.batching import RequestQueue
from tasks.core.memory.budget import TokenBudget
from tasks.core.records import FinishReason


@dataclass(frozen=True, slots=True)
class GeneratedRow:
    """One finished row: its new tokens (end token included) and how they came about."""

    position: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seconds: float
    batch_size: int


class Engine(Protocol):
    """A way to answer many prompts with one loaded model.

    Two more attributes tell what else must be seen to; without one, False holds.

    - `shares_steps`: rows of any length share a forward pass. The engine is not taken where the model's rotary
      positions depend on the longest row, and need not look for that itself.
    - `exact_in_float32`: on a CPU in float32 a row's answer does not depend on the rows beside it, so that no row is
      answered twice to measure how far it does.
    """

    name: str

    def unsupported(self) -> str | None:
        """Say why this engine cannot answer rightly with its model and settings, or None when it can."""

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        """Answer all of `queue`, yielding rows in the order in which they finish.

        Before each step the engine calls `budget.admit` with what it will hold, after a step that fitted
        `budget.clean_batch`, and keeps within `budget.limit_tokens` and `budget.max_rows`. It calls
        `queue.finish` before yielding a row. Out-of-memory errors pass through; the caller calls
        `queue.restore` and starts over with what is left.
        """


def shares_steps(engine: object) -> bool:
    """Whether an engine, or a class of engines, says that its rows share forward passes."""
    return bool(getattr(engine, "shares_steps", False))


def exact_in_float32(engine: object) -> bool:
    """Whether an engine, or a class of engines, says that in float32 its rows do not see each other."""
    return bool(getattr(engine, "exact_in_float32", False))
