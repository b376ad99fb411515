"""How far a run is: figures for a terminal bar or a Prefect progress artifact."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tasks.core.memory.budget import TokenBudget


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """A snapshot; rates are over this session, all counts include earlier sessions."""

    rows_done: int
    rows_total: int
    error_rows: int
    rows_per_second: float
    tokens_per_second: float
    eta_seconds: float | None
    limit_tokens: int
    batch_size: int
    out_of_memory_count: int


class ProgressMeter:
    """Counts finished rows and reports at most every `interval_seconds`, and once at the end.

    `rows_done`, `error_rows` and `out_of_memory_count` are those of earlier sessions.
    """

    def __init__(
        self,
        rows_total: int,
        rows_done: int,
        budget: TokenBudget,
        report: Callable[[GenerationProgress], None] | None,
        *,
        error_rows: int = 0,
        out_of_memory_count: int = 0,
        interval_seconds: float = 1.0,
    ) -> None:
        self._total, self._done, self._budget, self._report = rows_total, rows_done, budget, report
        self._errors, self._earlier_out_of_memory = error_rows, out_of_memory_count
        self._interval_seconds = interval_seconds
        self._new_rows = self._new_tokens = self._batch_size = 0
        self._started = time.monotonic()
        self._reported = 0.0

    def add(self, tokens: int, batch_size: int, *, error: bool) -> None:
        """Count one finished row."""
        self._done += 1
        self._new_rows += 1
        self._new_tokens += tokens
        self._errors += error
        self._batch_size = batch_size
        if self._report is not None and time.monotonic() - self._reported >= self._interval_seconds:
            self.report_now()

    def report_now(self) -> None:
        """Report whatever the interval says."""
        if self._report is None:
            return
        self._reported = time.monotonic()
        seconds = max(1e-6, self._reported - self._started)
        rate = self._new_rows / seconds
        self._report(
            GenerationProgress(
                rows_done=self._done,
                rows_total=self._total,
                error_rows=self._errors,
                rows_per_second=rate,
                tokens_per_second=self._new_tokens / seconds,
                eta_seconds=(self._total - self._done) / rate if rate else None,
                limit_tokens=self._budget.limit_tokens,
                batch_size=self._batch_size,
                out_of_memory_count=self._earlier_out_of_memory + self._budget.out_of_memory_count,
            )
        )
