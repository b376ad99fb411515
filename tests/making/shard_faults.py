"""Inferencers for test_shards.py that are slow or die; worker processes import them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tasks.core.config import with_overrides
from tasks.core.generation.runners.seats import VISIBLE_DEVICES
from tasks.core.memory.budget import TokenBudget
from tasks.core.models.loading import LoadedModel
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


class Seated(Inferencer):
    """Leaves a file named after the GPU that its process may see, and works on the CPU."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.config = with_overrides(self.config, {"inferencer.device": "cpu"})

    def load_model_and_tokenizer(self) -> LoadedModel:
        gpu = os.environ.get(VISIBLE_DEVICES, "none")
        (Path(self.config.pipeline.runs_dir) / f"gpu-{gpu}").touch()
        return super().load_model_and_tokenizer()


def main(overrides: dict[str, Any]) -> None:
    """Infer slowly with the given settings, to be killed from outside."""
    from tasks.core.config import load_config

    Slow(load_config(None, overrides)).infer()


if __name__ == "__main__":
    import json
    import sys

    main(json.loads(sys.argv[1]))
