"""Ctrl-C ends the work even where something on the way swallows the exception."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from tasks.core.generation.ladder import generate_all
from tasks.core.interruption import raise_if_interrupted, remembered_interrupts
from tasks.core.memory.budget import TokenBudget
from tests.generation.test_ladder import LimitedEngine, queue_of


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_raises_at_once_and_is_forgotten_after_the_command() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), remembered_interrupts():
        press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is before
    raise_if_interrupted()


def test_generation_ends_after_the_row_at_hand_when_a_library_swallowed_ctrl_c() -> None:
    rows = generate_all(LimitedEngine(100), queue_of([10] * 30), TokenBudget(100, 100), device="cpu")
    with remembered_interrupts():
        kept = [next(rows)]
        with contextlib.suppress(KeyboardInterrupt):
            press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            kept.extend(rows)
    assert [row.position for row in kept] == [0]


def test_an_event_loop_does_not_turn_ctrl_c_into_a_cancellation() -> None:
    async def swallows_cancellation() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            press_ctrl_c()
            await asyncio.sleep(10)

    with remembered_interrupts(), pytest.raises(KeyboardInterrupt):
        asyncio.run(swallows_cancellation())
