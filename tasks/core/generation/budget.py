"""How many tokens may be in memory at once: estimated, shrunk by trouble, grown back, remembered."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from tasks.core.errors import StorageError
from tasks.core.files import cache_dir, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """One step of the ladder, as logged and as written to the manifest."""

    kind: str  # out_of_memory | grow | pin | row_failed | process_died
    rows: int
    tokens: int
    limit_tokens: int
    message: str = ""


class TokenBudget:
    """The limit of tokens (prompt and room for the answer, over all rows in flight), and its ladder.

    `shrink` halves it, `clean_batch` grows it back by a quarter after a run of clean batches, and a size that
    failed twice is never tried again.
    """

    CLEAN_BATCHES_TO_GROW = 8

    def __init__(self, limit_tokens: int, max_rows: int) -> None:
        self.limit_tokens = max(1, limit_tokens)
        self.max_rows = max(1, max_rows)
        self.first_limit_tokens = self.limit_tokens
        self.largest_clean_tokens = 0
        self.events: list[MemoryEvent] = []
        self.on_admit: Callable[[int, int, str | None], None] | None = None
        """Told what every batch will hold before it starts; see isolation.py."""
        self._ceiling_tokens: int | None = None
        self._failures: list[int] = []
        self._clean = 0
        self._rows = 0
        self._tokens = 0

    @property
    def out_of_memory_count(self) -> int:
        """How often memory ran out in this run."""
        return sum(event.kind in ("out_of_memory", "process_died") for event in self.events)

    def admit(self, rows: int, tokens: int, alone: str | None = None) -> None:
        """Engines say here what they are about to hold; `shrink` starts from it.

        `alone` is the id of the row when it is the only one.
        """
        self._rows, self._tokens = rows, tokens
        if self.on_admit is not None:
            self.on_admit(rows, tokens, alone)

    @property
    def rows_in_flight(self) -> int:
        """Rows of the batch that was admitted last."""
        return self._rows

    def clean_batch(self) -> None:
        """Record one batch that fitted; may grow the limit."""
        self.largest_clean_tokens = max(self.largest_clean_tokens, self._tokens)
        self._clean += 1
        room = self.first_limit_tokens if self._ceiling_tokens is None else self._ceiling_tokens
        if self._clean < self.CLEAN_BATCHES_TO_GROW or self.limit_tokens >= room:
            return
        self._clean = 0
        self.limit_tokens = min(room, self.limit_tokens + max(1, self.limit_tokens // 4))
        self._record("grow", "")

    def shrink(self, message: str, kind: str = "out_of_memory") -> None:
        """Halve the limit after memory ran out in the batch that was admitted last."""
        failed_tokens = min(self._tokens or self.limit_tokens, self.limit_tokens)
        near = [tokens for tokens in self._failures if abs(tokens - failed_tokens) <= failed_tokens // 4]
        self._failures.append(failed_tokens)
        self._clean = 0
        self.limit_tokens = max(1, failed_tokens // 2)
        self._record(kind, message, tokens=failed_tokens)
        if near:
            self._ceiling_tokens = max(1, min(failed_tokens, *near) * 3 // 4)
            self._record(
                "pin", f"{failed_tokens} tokens failed twice; stays at or below {self._ceiling_tokens}"
            )

    def fail_row(self, message: str) -> None:
        """Record that a single row did not fit; the limit goes back to where it was before that row."""
        self._record("row_failed", message)
        self.limit_tokens = max(self.limit_tokens, self.largest_clean_tokens, 1)

    def _record(self, kind: str, message: str, *, tokens: int | None = None) -> None:
        event = MemoryEvent(
            kind, self._rows, self._tokens if tokens is None else tokens, self.limit_tokens, message
        )
        self.events.append(event)
        log = logger.info if kind == "grow" else logger.warning
        log(
            "memory: %s at %d rows, %d tokens; limit is now %d tokens%s",
            kind.replace("_", " "), event.rows, event.tokens, event.limit_tokens,
            f" ({message})" if message else "",
        )  # fmt: skip

    def events_as_dicts(self) -> tuple[dict[str, str | int], ...]:
        """All steps of the ladder, as the manifest keeps them."""
        return tuple(asdict(event) for event in self.events)

    def learned(self) -> LearnedBudget | None:
        """What the next run should start with, or None when this one met no limit.

        Half of the least that failed, or up to three quarters of it if as much as that was held to the end.
        """
        if not self._failures:
            return None
        least_failed = min(self._failures)
        held = min(self.largest_clean_tokens, least_failed * 3 // 4)
        return LearnedBudget(limit_tokens=max(1, least_failed // 2, held))


@dataclass(frozen=True, slots=True)
class LearnedBudget:
    """A limit that a run ended with; `out_of_memory_count` of the run after it tells whether it held."""

    limit_tokens: int


class BudgetStore(Protocol):
    """Where learned budgets are kept between runs: a file here, a Prefect Variable in tasks."""

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was learned under `key`, or None."""

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget` under `key`."""


class FileBudgetStore:
    """Learned budgets in one JSON file in the user's cache directory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_dir() / "budgets.json"

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was learned under `key`; an unreadable file counts as nothing learned."""
        entry = self._read().get(key)
        return LearnedBudget(**entry) if entry else None

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget`; a cache that cannot be written is logged, never an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                entries = {**self._read(), key: asdict(budget)}
                write_atomically(self.path, json.dumps(entries, indent=1, sort_keys=True))
        except (OSError, StorageError) as exc:
            logger.warning("the learned memory budget could not be kept in %s: %s", self.path, exc)

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}
