"""How many tokens may be in memory at once: estimated, shrunk by trouble, grown back, remembered."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from tasks.core.errors import StorageError
from tasks.core.files import cache_dir, write_atomically
from tasks.core.records import MemoryEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LearnedBudget:
    """Where a run starts: the limit that an earlier one ended with, and the least that failed there.

    `failed_tokens` None: nothing is known to fail, the limit is only a careful start.
    """

    limit_tokens: int
    failed_tokens: int | None = None


class TokenBudget:
    """The limit of tokens (prompt and room for the answer, over all rows in flight), and its ladder.

    `shrink` halves it, `clean_batch` grows it back by a quarter after a run of clean batches, and a size that
    failed twice is not tried again in this run. It never grows beyond `limit_tokens`, what memory should hold;
    with `learned` it starts there, and grows to three quarters of what failed in the run before.
    """

    CLEAN_BATCHES_TO_GROW = 8

    def __init__(self, limit_tokens: int, max_rows: int, learned: LearnedBudget | None = None) -> None:
        self._most_tokens = self.limit_tokens = max(1, limit_tokens)
        self.max_rows = max(1, max_rows)
        self._start = learned
        if learned is not None:
            self.limit_tokens = max(1, min(limit_tokens, learned.limit_tokens))
            if learned.failed_tokens is not None:
                held = max(self.limit_tokens, learned.failed_tokens * 3 // 4)
                self._most_tokens = min(self._most_tokens, held)
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
        return sum(event.ran_out for event in self.events)

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
        room = self._most_tokens if self._ceiling_tokens is None else self._ceiling_tokens
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
            kind=kind,
            rows=self._rows,
            tokens=self._tokens if tokens is None else tokens,
            limit_tokens=self.limit_tokens,
            message=message,
        )
        self.events.append(event)
        log = logger.info if kind == "grow" else logger.warning
        log(
            "memory: %s at %d rows, %d tokens; limit is now %d tokens%s",
            kind.replace("_", " "), event.rows, event.tokens, event.limit_tokens,
            f" ({message})" if message else "",
        )  # fmt: skip

    def learned(self) -> LearnedBudget | None:
        """What the next run should start with, or None when no limit was met, in this run or in one before.

        After a failure half of the least that failed, or up to three quarters of it if as much as that was held
        to the end. Without one the largest size that was held, and the next run may go an eighth beyond it: what
        failed may have failed for a neighbour that is gone.
        """
        if self._failures:
            least_failed = min(self._failures)
            held = min(self.largest_clean_tokens, least_failed * 3 // 4)
            return LearnedBudget(max(1, least_failed // 2, held), least_failed)
        start, held = self._start, self.largest_clean_tokens
        if start is None or start.failed_tokens is None:
            return None
        return LearnedBudget(max(start.limit_tokens, held), max(start.failed_tokens, held * 3 // 2))


class BudgetStore(Protocol):
    """Where learned budgets are kept between runs: a file here, a Prefect Variable in tasks."""

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was learned under `key`, or None."""

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget` under `key`."""


# More are not kept; the first to go is the one that no run has used for longest.
MOST_ENTRIES = 30
Entries = dict[str, dict[str, int | None]]


def learned_in(entries: Entries, key: str) -> LearnedBudget | None:
    """Return what the entry of `key` says; None when there is none or it is damaged."""
    entry = entries.get(key, {})
    limit, failed = entry.get("limit_tokens"), entry.get("failed_tokens")
    if not isinstance(limit, int) or not isinstance(failed, int | None):
        return None
    return LearnedBudget(limit, failed)


def with_learned(
    entries: Entries, key: str, budget: LearnedBudget, *, most_characters: int | None = None
) -> Entries:
    """Return `entries` with `budget` under `key`: at most 30, and at most `most_characters` as JSON."""
    new = {**entries, key: {**asdict(budget), "saved_at": int(time.time())}}
    oldest_first = sorted(new, key=lambda name: (name == key, new[name].get("saved_at") or 0))
    kept = {name: new[name] for name in oldest_first[-MOST_ENTRIES:]}
    while most_characters is not None and len(kept) > 1 and len(json.dumps(kept)) > most_characters:
        del kept[next(iter(kept))]
    return kept


def as_entries(stored: object) -> Entries:
    """Return what of a stored value can be entries; a damaged one has none."""
    if not isinstance(stored, dict):
        return {}
    return {str(key): entry for key, entry in stored.items() if isinstance(entry, dict)}


class FileBudgetStore:
    """Learned budgets in one JSON file in the user's cache directory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_dir() / "budgets.json"

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was learned under `key`; an unreadable file counts as nothing learned."""
        return learned_in(self._read(), key)

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget`; a cache that cannot be written is logged, never an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                entries = with_learned(self._read(), key, budget)
                write_atomically(self.path, json.dumps(entries, indent=1))
        except (OSError, StorageError) as exc:
            logger.warning("the learned memory budget could not be kept in %s: %s", self.path, exc)

    def _read(self) -> Entries:
        try:
            return as_entries(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            return {}


@dataclass(frozen=True, slots=True)
class HandedOnStore:
    """A store for a process that goes on for one that died: `learned`, if any, comes before what is kept."""

    kept: BudgetStore
    learned: LearnedBudget | None

    def load(self, key: str) -> LearnedBudget | None:
        """Return what was handed on, else what the store has."""
        return self.learned or self.kept.load(key)

    def save(self, key: str, budget: LearnedBudget) -> None:
        """Remember `budget` in the store."""
        self.kept.save(key, budget)
