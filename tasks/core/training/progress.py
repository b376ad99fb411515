"""How far a training is: figures for a terminal bar or a progress artifact."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """A snapshot after an optimizer step. Rates are over this session; `loss` is the step's mean per token."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    validation_loss: float | None
    learning_rate: float | None
    tokens_per_second: float
    eta_seconds: float | None


class TrainingMeter:
    """Turns finished steps into progress reports, at most one every `interval_seconds` and one at the end."""

    def __init__(
        self, report: Callable[[TrainingProgress], None] | None, *, interval_seconds: float = 0.5
    ) -> None:
        self._report = report
        self._interval_seconds = interval_seconds
        self._started = time.monotonic()
        self._reported = 0.0
        self._first_step = 0
        self._tokens = 0
        self._validation_loss: float | None = None

    def start(self, step: int) -> None:
        """Begin at `step`, which is not 0 when training was resumed."""
        self._started, self._first_step = time.monotonic(), step

    def add_tokens(self, count: int) -> None:
        """Count tokens, padding excluded."""
        self._tokens += count

    def note_validation(self, loss: float) -> None:
        """Keep the newest validation loss for the reports that follow."""
        self._validation_loss = loss

    def step_done(
        self, step: int, total_steps: int, *, epoch: float, loss: float, learning_rate: float | None
    ) -> None:
        """Report, unless the last report was a moment ago."""
        now = time.monotonic()
        if self._report is None or (now - self._reported < self._interval_seconds and step < total_steps):
            return
        self._reported = now
        seconds, steps = now - self._started, step - self._first_step
        self._report(
            TrainingProgress(
                step=step,
                total_steps=total_steps,
                epoch=epoch,
                loss=loss,
                validation_loss=self._validation_loss,
                learning_rate=learning_rate,
                tokens_per_second=self._tokens / seconds if seconds > 0 else 0.0,
                eta_seconds=(total_steps - step) * seconds / steps if steps else None,
            )
        )
