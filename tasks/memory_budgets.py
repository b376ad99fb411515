"""What was learned about memory, shared by all workers of a Prefect server; a file where there is none."""

from __future__ import annotations

import logging
from dataclasses import asdict

import httpx
from prefect.exceptions import PrefectException
from prefect.variables import Variable

from tasks.core.generation.budget import FileBudgetStore, LearnedBudget

logger = logging.getLogger(__name__)

VARIABLE = "tuneproof_memory_budgets"


class PrefectBudgetStore:
    """Learned budgets in one Prefect Variable, and in the file as well for runs without a server."""

    def __init__(self) -> None:
        self._file = FileBudgetStore()

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was learned under `key` by any worker, else what this machine's file says."""
        entry = self._entries().get(key)
        return LearnedBudget(**entry) if entry else self._file.load(key)

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget` in both places; a server that is away is logged, never an error."""
        self._file.save(key, budget)
        try:
            Variable.set(VARIABLE, {**self._entries(), key: asdict(budget)}, overwrite=True)
        except (PrefectException, httpx.HTTPError) as exc:
            logger.warning("the learned memory budget is kept in a file only: %s", exc)

    def _entries(self) -> dict[str, dict[str, int]]:
        try:
            entries = Variable.get(VARIABLE, default={})
        except (PrefectException, httpx.HTTPError) as exc:
            logger.warning("learned memory budgets are read from a file only: %s", exc)
            return {}
        return entries if isinstance(entries, dict) else {}
