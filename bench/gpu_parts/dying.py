"""Inferencers whose first process dies in the middle; child processes import them by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tasks.core.memory.budget import TokenBudget
from tasks.inferencer import Inferencer


class AbortsOnce(Inferencer):
    """Its first process ends in the middle as native code does after a failed assertion."""

    signal_number = signal.SIGABRT

    def token_budget(self) -> TokenBudget:
        """Die at the third batch, once."""
        budget = super().token_budget()
        tell, marker = (
            budget.on_admit,
            Path(self.config.pipeline.runs_dir) / f"died-{self.signal_number.name}",
        )
        batches = 0

        def admit(rows: int, tokens: int, alone: str | None) -> None:
            nonlocal batches
            batches += 1
            if tell is not None:
                tell(rows, tokens, alone)
            if batches == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), self.signal_number)

        budget.on_admit = admit
        return budget


class KilledOnce(AbortsOnce):
    """Its first process is killed by somebody."""

    signal_number = signal.SIGKILL
