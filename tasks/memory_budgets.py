"""What was learned about memory, shared by all workers of a Prefect server; a file where there is none."""

from __future__ import annotations

import logging
import os

import httpx
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL
from prefect.variables import Variable

from tasks.core.memory.budget import (
    Entries,
    FileBudgetStore,
    LearnedBudget,
    as_entries,
    learned_in,
    with_learned,
)
from tasks.server.telling import server_answers

logger = logging.getLogger(__name__)

VARIABLE = "tuneproof_memory_budgets"
# Prefect refuses a Variable of more than 5,000 characters.
MOST_CHARACTERS = 4500
# The client refuses values with pydantic's ValidationError, a ValueError.
_FAILURES = (PrefectException, httpx.HTTPError, ValueError)


class PrefectBudgetStore:
    """Learned budgets in one Prefect Variable, and in the file as well for runs without a server.

    A child process of a flow without a server of its own keeps to the file: asking Prefect there would start
    another temporary server, which outlives a child that is killed.
    """

    def __init__(self) -> None:
        self._file = FileBudgetStore()
        self._process_id = os.getpid()

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was learned under `key` by any worker, else what this machine's file says."""
        return learned_in(self._entries(), key) or self._file.load(key)

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget` in both places; a server that is away or refuses it is logged, never an error."""
        self._file.save(key, budget)
        if not self._has_server():
            return
        try:
            entries = with_learned(self._entries(), key, budget, most_characters=MOST_CHARACTERS)
            Variable.set(VARIABLE, entries, overwrite=True)
        except _FAILURES as exc:
            logger.warning("the learned memory budget is kept in a file only: %s", exc)

    def _has_server(self) -> bool:
        """Whether a server answers: the one that the settings name, or the temporary one of this process."""
        is_named = bool(PREFECT_API_URL.value()) or os.getpid() == self._process_id
        return is_named and server_answers()

    def _entries(self) -> Entries:
        if not self._has_server():
            return {}
        try:
            return as_entries(Variable.get(VARIABLE, default={}))
        except _FAILURES as exc:
            logger.warning("learned memory budgets are read from a file only: %s", exc)
            return {}
