"""After each death of a generating process: a smaller batch, an error row, or an end."""

from __future__ import annotations

import pytest

from tasks.core.generation.runners.deaths import Admitted, DeathLadder, Step
from tasks.core.memory.budget import LearnedBudget

ROOM = 100


def deaths(
    ladder: DeathLadder, waiting: list[str], most_rows: int, lethal: str = "", *, for_memory: bool = False
) -> list[Step]:
    """Let processes die that bear so many rows of 100 tokens each, until one answers all or the ladder gives up."""
    steps: list[Step] = []
    while True:
        limit = 10**6 if ladder.learned is None else ladder.learned.limit_tokens
        rows = min(len(waiting), max(1, limit // ROOM))
        if rows <= most_rows and lethal not in waiting:
            return steps
        if rows <= most_rows and lethal in waiting[rows:]:
            waiting = waiting[waiting.index(lethal) :]
            ladder.made_progress()
            rows = min(len(waiting), rows)
        last = Admitted(rows, rows * ROOM, waiting[0] if rows == 1 else None)
        steps.append(ladder.step_after(last, for_memory=for_memory))
        if steps[-1] == "give_up":
            return steps
        if steps[-1] == "fail_row":
            waiting = waiting[1:]


def rows(count: int) -> list[str]:
    return [f"r{n}" for n in range(count)]


@pytest.mark.parametrize("count", [60, 256, 4000])
def test_a_crash_that_few_rows_fit_is_walked_down_to_however_large_the_first_batch_is(count: int) -> None:
    ladder = DeathLadder()
    assert set(deaths(ladder, rows(count), most_rows=3)) == {"smaller"}
    assert ladder.learned is not None
    assert 1 <= ladder.learned.limit_tokens // ROOM <= 3


def test_a_lethal_row_is_given_up_alone_and_how_much_fits_is_not_known_from_it() -> None:
    ladder = DeathLadder()
    steps = deaths(ladder, rows(64), most_rows=64, lethal="r0")
    assert steps[-2:] == ["again", "fail_row"]
    assert set(steps[:-2]) == {"smaller"}
    assert ladder.learned is not None
    assert ladder.learned.failed_tokens is None


def test_rows_answered_between_its_deaths_do_not_make_a_lethal_row_a_matter_of_memory() -> None:
    ladder = DeathLadder()
    deaths(ladder, rows(64), most_rows=64, lethal="r9")
    ladder.made_progress()
    assert ladder.learned is not None
    assert ladder.learned.failed_tokens is None


def test_a_row_too_large_for_memory_leaves_what_is_known_of_memory() -> None:
    ladder = DeathLadder()
    deaths(ladder, rows(4), most_rows=4, lethal="r0", for_memory=True)
    assert ladder.learned == LearnedBudget(ROOM, 2 * ROOM)


def test_processes_that_die_at_every_row_come_to_an_end() -> None:
    steps = deaths(DeathLadder(), rows(1000), most_rows=0)
    assert steps[-1] == "give_up"
    assert steps.count("fail_row") == 2


def test_every_row_is_tried_when_the_kernel_says_that_memory_is_short() -> None:
    steps = deaths(DeathLadder(), rows(10), most_rows=0, for_memory=True)
    assert steps.count("fail_row") == 10


@pytest.mark.parametrize("for_memory", [False, True])
def test_a_process_that_does_not_say_which_row_is_alone_is_not_begun_for_ever(for_memory: bool) -> None:
    ladder = DeathLadder()
    prefix = Admitted(1, 5000)
    assert [ladder.step_after(prefix, for_memory=for_memory) for _ in range(2)] == ["again", "give_up"]


def test_an_engine_that_ignores_the_limit_is_not_begun_for_ever() -> None:
    ladder = DeathLadder()
    steps = [ladder.step_after(Admitted(8, 10**6), for_memory=True) for _ in range(30)]
    assert steps.index("give_up") <= 6


def test_a_death_before_the_first_batch_is_no_matter_of_the_batch() -> None:
    assert DeathLadder().step_after(Admitted(0, 0), for_memory=True) == "give_up"
