"""Faults in the processes of a training: which of them, where, what, and in how many tries.

`planted` lets each process of a group begin with `begin_with_fault`, which reads what to do from the environment.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

VARIABLE = "TUNEPROOF_TESTS_TRAINING_FAULT"

PLACES = {
    "loading": ("tasks.core.training.session", "load_model_and_tokenizer"),
    "forward": ("tasks.core.training.trainer", "AnswerTrainer.compute_loss"),
    "gradients": ("tasks.core.training.trainer", "add_up_gradients"),
    "optimizer": ("tasks.core.training.trainer", "AnswerTrainer._clip_grad_norm"),
    "validation": ("tasks.core.training.trainer", "AnswerTrainer._own_validation"),
    "checkpoint": ("tasks.core.training.trainer", "AnswerTrainer._check_equal"),
    "seal": ("tasks.core.training.checkpoints", "seal"),
    "rotation": ("tasks.core.training.checkpoints", "rotate"),
    "best": ("tasks.core.training.session", "_take_best"),
    "publishing": ("tasks.core.training.weights", "publish_files"),
}


def planted(
    patch: pytest.MonkeyPatch, where: str, what: str, *, rank: int = 1, call: int = 1, tries: int = 1
) -> None:
    """In the first `tries`, let process `rank` have the fault `what` at the `call`-th call of what is `where`."""
    from tasks.core.training.processes import agent

    patch.setattr(agent, "begin", begin_with_fault)
    fault = {"where": where, "what": what, "rank": rank, "call": call, "tries": tries}
    patch.setenv(VARIABLE, json.dumps(fault))


def begin_with_fault(*arguments: Any) -> None:
    """What the agent starts."""
    from tasks.core.training.processes.child import begin

    fault = json.loads(os.environ[VARIABLE])
    is_here = int(os.environ["RANK"]) == fault["rank"]
    if is_here and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < fault["tries"]:
        if fault["where"] == "starting":
            happen(fault["what"])
        else:
            _plant(fault)
    begin(*arguments)


def _plant(fault: dict[str, Any]) -> None:
    import importlib

    module, _, path = (*PLACES[fault["where"]][:1], "", PLACES[fault["where"]][1])
    holder: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    real: Callable[..., Any] = getattr(holder, name)
    calls = 0

    def faulty(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault["call"]:
            happen(fault["what"])
        return real(*arguments, **named)

    setattr(holder, name, faulty)


def happen(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    if what == "bug":
        raise AttributeError("a fault of the test's")
    if what == "error":
        from tasks.core.errors import StorageError

        raise StorageError("the disk of the test is full", "free some space")
    if what == "hang":
        time.sleep(10_000)
