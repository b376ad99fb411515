"""What the deaths of generating processes mean: how much the next one may hold, which row is lethal, when to stop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tasks.core.memory.budget import LearnedBudget

# A row that was alone at this many deaths becomes an error row.
DEATHS_OF_A_ROW = 2
# So many deaths in succession that no smaller batch can follow, and no row answered: it is not for lack of memory.
FRUITLESS_DEATHS = 6

Step = Literal["smaller", "again", "fail_row", "give_up"]


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a process's next batch holds; `alone` is the id of its only row."""

    rows: int
    tokens: int
    alone: str | None = None


class DeathLadder:
    """Decides after each death what comes next.

    `learned` is what the next process starts with; `holds` tells that a process has answered rows with it.
    """

    def __init__(self) -> None:
        self.learned: LearnedBudget | None = None
        self.holds = False
        self._certain: LearnedBudget | None = None
        self._deaths: Counter[str | None] = Counter()
        self._fruitless = 0
        self._last_tokens: int | None = None

    def made_progress(self) -> None:
        """Note that the process has answered rows, before the step after its death."""
        self.holds, self._fruitless, self._last_tokens = self.learned is not None, 0, None
        del self._deaths[None]

    def step_after(self, last: Admitted, *, for_memory: bool) -> Step:
        """Say what to do after a process died at `last`; `for_memory`: the kernel says that it was for that.

        Every batch is half of the one before, and each row alone is tried a fixed number of times, so that deaths
        without progress come to an end.
        """
        if last.rows == 0:
            return "give_up"
        stuck = self._last_tokens is not None and last.tokens >= self._last_tokens
        self._last_tokens = last.tokens
        if last.rows > 1:
            self._fruitless += stuck
            return self._halve(last, for_memory=for_memory)
        self._deaths[last.alone] += 1
        known = last.alone is not None
        self._fruitless += not (for_memory and known)
        if self._fruitless >= FRUITLESS_DEATHS:
            return "give_up"
        if self._deaths[last.alone] < DEATHS_OF_A_ROW:
            return "again"
        if not known:
            return "give_up"
        self._last_tokens = None
        if self.learned is not None and not for_memory:
            # The row may have ended larger batches too: only what the kernel said is known of memory.
            failed = None if self._certain is None else self._certain.failed_tokens
            self.learned = LearnedBudget(self.learned.limit_tokens, failed)
        return "fail_row"

    def _halve(self, last: Admitted, *, for_memory: bool) -> Step:
        failed = last.tokens
        if self.learned is not None and not self.holds:  # the limit cannot have grown
            failed = min(failed, self.learned.limit_tokens)
        learned = LearnedBudget(max(1, failed // 2), failed)
        if self._fruitless >= FRUITLESS_DEATHS or learned == self.learned:
            return "give_up"
        self.learned, self.holds = learned, False
        if for_memory:
            self._certain = learned
        return "smaller"
