"""Several lanes answer like one: the same rows, within one budget, and nothing of them stays behind."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines import inflight
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.generation.engines.lanes import Admission, Lane, lane_count, side_by_side
from tasks.core.generation.ladder import generate_all
from tasks.core.memory.budget import TokenBudget
from tasks.core.records import GenerationSettings
from tests.generation.engines.test_engines import (
    COVERED,
    alone,
    answers,
    build,
    found,
    loaded,
    prompts,
    queue_of,
    unequal,
)
from tests.generation.engines.test_independent_rows import without_end

SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    """As torch has it on a machine with two cores; afterwards as it was, and no lane is left."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]
    torch.set_num_threads(before)


def engine_of(model: Any, tokenizer: Any, settings: GenerationSettings = SETTINGS) -> InflightEngine:
    engine: InflightEngine = without_end(InflightEngine(loaded(model, tokenizer), settings))
    return engine


def tokens_of(rows: dict[int, GeneratedRow]) -> list[list[int]]:
    return [list(rows[place].token_ids) for place in sorted(rows)]


@pytest.fixture(scope="module")
def sixty(tiny_tokenizer: Any) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Prompts, and what the model "llama" answers to each alone."""
    texts = prompts(60, len(tiny_tokenizer))
    return texts, alone(build("llama", len(tiny_tokenizer)), texts)


@pytest.mark.parametrize("architecture", COVERED)
def test_rows_in_lanes_get_the_answers_that_they_get_alone(
    architecture: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(architecture, len(tiny_tokenizer))
    texts = prompts(40, len(tiny_tokenizer), shared=20)
    expected = unequal(alone(model, texts))
    engine = engine_of(model, tiny_tokenizer)
    assert lane_count("cpu", 40) == 2
    for rows, shared in [(40, 0), (18, 20)]:
        assert found(engine, texts, expected, rows, shared) == expected
    monkeypatch.setattr(inflight, "SMALLEST_ATTENDED_PREFIX", 16)
    monkeypatch.setattr(inflight, "lane_count", lambda *_: 3)
    engine._prefill_tokens = 16  # longer prompts enter in stretches
    assert found(engine, texts, expected, 18, 20) == expected


def test_draws_do_not_depend_on_the_lane(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", len(tiny_tokenizer))
    texts = prompts(40, len(tiny_tokenizer))
    sampled = GenerationSettings(max_new_tokens=12, temperature=0.9, seed=3)
    results = []
    for lanes in (1, 2, 4):
        monkeypatch.setattr(inflight, "lane_count", lambda *_, lanes=lanes: lanes)
        results.append(tokens_of(answers(engine_of(model, tiny_tokenizer, sampled), queue_of(texts))))
    assert results[0] == results[1] == results[2]


def test_one_lane_for_few_rows_and_off_the_cpu() -> None:
    assert lane_count("cpu", 64) == 2
    assert lane_count("cpu", 15) == 1
    assert lane_count("cuda:0", 64) == 1
    torch.set_num_threads(1)
    assert lane_count("cpu", 64) == 1
    torch.set_num_threads(2)


def test_all_lanes_together_stay_within_rows_and_tokens(tiny_tokenizer: Any, sixty: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    for limit_tokens, max_rows, count in [(300, 64, 40), (10**6, 17, 40), (1, 64, 10)]:
        texts, expected = (part[:count] for part in sixty)
        budget, held = TokenBudget(limit_tokens, max_rows), list[tuple[int, int]]()

        def hold(into: list[tuple[int, int]], rows: int, tokens: int, _alone: str | None) -> None:
            into.append((rows, tokens))

        budget.on_admit = functools.partial(hold, held)
        rows = {
            row.position: row for row in engine_of(model, tiny_tokenizer).generate(queue_of(texts), budget)
        }
        assert tokens_of(rows) == expected
        assert max(count for count, _ in held) <= max_rows
        # A row that does not fit is tried alone.
        assert all(tokens <= limit_tokens for count, tokens in held if count > 1)


def test_both_lanes_work(tiny_tokenizer: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    steps: dict[str, int] = {}
    model.model.register_forward_pre_hook(
        lambda *_: steps.update(
            {threading.current_thread().name: steps.get(threading.current_thread().name, 0) + 1}
        )
    )
    answers(engine_of(model, tiny_tokenizer), queue_of(prompts(64, len(tiny_tokenizer))))
    lanes = [count for name, count in steps.items() if name.startswith("lane-")]
    assert len(lanes) == 2
    assert min(lanes) >= 12


def failing_after(model: Any, steps: int, error: BaseException) -> None:
    """Let one step in the middle fail, in whichever lane it is."""
    left = [steps]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    model.model.register_forward_pre_hook(count)


def test_memory_that_runs_out_in_one_lane_ends_all_and_no_row_is_lost_or_doubled(
    tiny_tokenizer: Any, sixty: Any
) -> None:
    model = build("llama", len(tiny_tokenizer))
    texts, expected = sixty
    for steps in (5, 17, 33):
        failing_after(model, steps, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"))
        budget = TokenBudget(10**6, 20)
        rows = list(generate_all(engine_of(model, tiny_tokenizer), queue_of(texts), budget, device="cpu"))
        assert sorted(row.position for row in rows) == list(range(len(texts)))
        assert tokens_of({row.position: row for row in rows}) == expected
        assert budget.out_of_memory_count == 1


def test_an_error_of_one_lane_comes_after_the_rows_that_were_finished(tiny_tokenizer: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    failing_after(model, 40, ValueError("broken layer"))
    queue, rows = queue_of(prompts(60, len(tiny_tokenizer))), []
    with pytest.raises(ValueError, match="broken layer"):
        for row in engine_of(model, tiny_tokenizer).generate(queue, TokenBudget(10**6, 20)):
            rows.append(row.position)
    assert 0 < len(set(rows)) == 60 - queue.unfinished


def test_lanes_end_when_nobody_wants_more_rows(tiny_tokenizer: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    queue = queue_of(prompts(200, len(tiny_tokenizer)))
    rows = generate_all(engine_of(model, tiny_tokenizer), queue, TokenBudget(10**6, 20), device="cpu")
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert queue.unfinished > 100  # the fixture looks for lanes that are left


def test_without_a_second_thread_its_rows_are_answered_afterwards(
    tiny_tokenizer: Any, sixty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "lane-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    model = build("llama", len(tiny_tokenizer))
    texts, expected = (part[:40] for part in sixty)
    assert tokens_of(answers(engine_of(model, tiny_tokenizer), queue_of(texts))) == expected


def test_two_sessions_at_once_leave_the_number_of_threads_as_it_was(tiny_tokenizer: Any, sixty: Any) -> None:
    models = [build(name, len(tiny_tokenizer)) for name in ("llama", "qwen3")]
    texts, expected = (part[:40] for part in sixty)

    def generate(model: Any) -> tuple[list[list[int]], int]:
        got = tokens_of(answers(engine_of(model, tiny_tokenizer), queue_of(texts)))
        return got, torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(generate, models))
    assert [got for got, _ in results] == [expected, alone(models[1], texts)]
    assert [threads for _, threads in results] == [2, 2]


def requests_queue(lengths: list[int]) -> RequestQueue:
    return RequestQueue(
        range(len(lengths)), lengths, lambda place: Request(place, f"r{place}", (5,) * lengths[place], 0)
    )


def test_rows_are_dealt_by_their_order_alone_and_lanes_hold_equal_shares() -> None:
    admission = Admission(requests_queue([10, 50, 20, 40, 30]), TokenBudget(140, 6), lanes=2)
    first, second = admission.lanes
    taken = [request.position for _ in range(4) if (request := second.take(lambda _: True))]
    assert taken == [3, 2]  # the second and the fourth by length
    taken = [request.position for _ in range(4) if (request := first.take(lambda _: True))]
    assert taken == [1]  # 50 of its 70 tokens are taken, the next row has 30
    assert (first.waiting, second.waiting) == (2, 0)
    assert admission.rows == 3


def test_what_lanes_gave_back_is_dealt_anew_longest_first() -> None:
    queue = requests_queue([10, 50, 20, 40, 30, 60, 5])
    admission = Admission(queue, TokenBudget(10**6, 64), lanes=3)
    for lane in admission.lanes:
        request = lane.take(lambda _: True)
    assert request is not None
    admission.lanes[-1].leave(request, flying=3)
    assert request.position == 3
    assert [back.position for back in queue.restore()] == [5, 1]
    assert len(queue) == queue.unfinished == 6
    again = Admission(queue, TokenBudget(10**6, 64), lanes=2)
    taken = [
        [request.position for _ in range(7) if (request := lane.take(lambda _: True))] for lane in again.lanes
    ]
    assert taken == [[5, 4, 0], [1, 2, 6]]
    assert queue.restore()[0].position == 5
    assert [queue.take().position for _ in range(6)] == [5, 1, 4, 2, 0, 6]


@pytest.mark.parametrize("seed", range(5))
def test_lanes_that_finish_rows_at_random_times_answer_each_once(seed: int) -> None:
    source = random.Random(seed)
    queue = requests_queue([source.randint(1, 50) for _ in range(300)])
    admission = Admission(queue, TokenBudget(200, 12), lanes=3)

    def flight(lane: Lane) -> Iterator[GeneratedRow]:
        mine: list[Request] = []
        while lane.waiting or mine:
            while (request := lane.take(lambda _: True)) is not None:
                mine.append(request)
            flying = lane.step()
            done = mine.pop(source.randrange(len(mine)))
            lane.leave(done, flying)
            yield GeneratedRow(done.position, (1,), "text", "stop", 0.0, flying)

    flights = [functools.partial(flight, lane) for lane in admission.lanes]
    rows = list(side_by_side(flights, admission))
    assert sorted(row.position for row in rows) == list(range(300))
    assert max(row.batch_size for row in rows) <= 12
    assert queue.unfinished == 0


def test_the_same_rows_share_steps_in_every_run(tiny_tokenizer: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    texts = prompts(60, len(tiny_tokenizer))
    seen: list[set[tuple[int, ...]]] = []
    slow = [""]

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        seen[-1].add(tuple(inputs["input_ids"][0].tolist()))
        if threading.current_thread().name == slow[0]:
            time.sleep(0.01)

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    for slow[0] in ("lane-0", "lane-1"):
        seen.append(set())
        answers(engine_of(model, tiny_tokenizer), queue_of(texts), rows=20)
    assert seen[0] == seen[1]


def test_no_lane_is_too_small_for_the_largest_row() -> None:
    assert lane_count("cpu", 64, fitting_rows=1) == 1
    assert lane_count("cpu", 64, fitting_rows=2) == 2
