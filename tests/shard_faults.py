"""Inferencers for test_shards.py that are slow or die; worker processes import them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tasks.core.generation.budget import TokenBudget
from tasks.inferencer import Inferencer


class Slow(Inferencer):
    """Waits before each batch, so that a signal meets it half-way."""

    def token_budget(self) -> TokenBudget:
        budget = super().token_budget()
        budget.on_admit = lambda rows, tokens, alone: time.sleep(0.15)
        return budget


class DiesOnce(Inferencer):
    """Is killed in the middle of its first shard; a file tells that it happened."""

    def token_budget(self) -> TokenBudget:
        budget = super().token_budget()
        marker = Path(self.config.pipeline.runs_dir) / "died"
        batches = 0

        def admit(rows: int, tokens: int, alone: str | None) -> None:
            nonlocal batches
            batches += 1
            if batches == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        budget.on_admit = admit
        return budget


def main(overrides: dict[str, Any]) -> None:
    """Infer slowly with the given settings, to be killed from outside."""
    from tasks.core.config import load_config

    Slow(load_config(None, overrides)).infer()


if __name__ == "__main__":
    import json
    import sys

    main(json.loads(sys.argv[1]))
