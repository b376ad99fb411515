"""The token budget over several runs: what was learned is used, and improved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.core.generation.answering import budget_key
from tasks.core.memory.budget import (
    MOST_ENTRIES,
    FileBudgetStore,
    HandedOnStore,
    LearnedBudget,
    TokenBudget,
)
from tasks.core.models.loading import LoadedModel
from tasks.core.records import ModelIdentity
from tests.conftest import build_tiny_model

ESTIMATE = 100_000


def work(budget: TokenBudget, fits_tokens: int, batches: int = 400) -> None:
    """Fill the budget again and again on a device that holds `fits_tokens`."""
    for _ in range(batches):
        budget.admit(10, budget.limit_tokens)
        if budget.limit_tokens > fits_tokens:
            budget.shrink("no room")
        else:
            budget.clean_batch()


def test_the_run_after_one_that_ran_out_of_memory_does_not_and_holds_more() -> None:
    first = TokenBudget(ESTIMATE, 64)
    work(first, fits_tokens=60_000, batches=3)
    learned = first.learned()
    assert learned == LearnedBudget(50_000, ESTIMATE)
    second = TokenBudget(ESTIMATE, 64, learned)
    assert second.limit_tokens == 50_000
    work(second, fits_tokens=80_000)
    assert second.out_of_memory_count == 0
    improved = second.learned()
    assert improved is not None
    assert improved.limit_tokens == 75_000


def test_memory_that_a_neighbour_took_once_is_used_again_after_some_runs() -> None:
    first = TokenBudget(ESTIMATE, 64)
    work(first, fits_tokens=30_000, batches=100)
    learned = first.learned()
    limits = []
    for _ in range(14):
        budget = TokenBudget(ESTIMATE, 64, learned)
        work(budget, fits_tokens=10 * ESTIMATE)
        assert budget.out_of_memory_count == 0
        learned = budget.learned()
        limits.append(budget.limit_tokens)
    assert limits == sorted(limits)
    assert limits[0] < ESTIMATE // 2
    assert limits[-1] == ESTIMATE


def test_a_limit_that_holds_is_found_again_when_it_is_tried() -> None:
    learned: LearnedBudget | None = LearnedBudget(30_000, 60_000)
    events = 0
    for _ in range(9):
        budget = TokenBudget(ESTIMATE, 64, learned)
        work(budget, fits_tokens=55_000, batches=30)
        learned, events = budget.learned(), events + budget.out_of_memory_count
        assert learned is not None
        assert learned.limit_tokens <= 55_000
    assert events <= 3


def test_a_careful_start_without_a_failure_teaches_nothing_and_ends_at_the_estimate() -> None:
    budget = TokenBudget(ESTIMATE, 64, LearnedBudget(1000))
    work(budget, fits_tokens=10 * ESTIMATE)
    assert budget.limit_tokens == ESTIMATE
    assert budget.learned() is None


def test_the_budgets_that_were_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileBudgetStore(tmp_path / "budgets.json")
    for number in range(MOST_ENTRIES + 5):
        monkeypatch.setattr("time.time", lambda number=number: 1000 + number)
        store.save(f"{99 - number}", LearnedBudget(number))
    assert store.load("99") is None
    assert store.load(f"{99 - 5}") == LearnedBudget(5)
    assert store.load(f"{99 - MOST_ENTRIES - 4}") == LearnedBudget(MOST_ENTRIES + 4)


def test_what_is_handed_on_comes_before_what_is_kept(tmp_path: Path) -> None:
    kept = FileBudgetStore(tmp_path / "budgets.json")
    kept.save("m", LearnedBudget(7))
    assert HandedOnStore(kept, None).load("m") == LearnedBudget(7)
    handed = HandedOnStore(kept, LearnedBudget(3))
    assert handed.load("m") == LearnedBudget(3)
    handed.save("m", LearnedBudget(4))
    assert kept.load("m") == LearnedBudget(4)


def test_the_next_model_of_the_same_shape_uses_what_was_learned(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    def key(weights: str, **shape: int) -> str:
        identity = ModelIdentity(
            model_id="m", weights_sha256=weights, dtype="float32", chat_template_sha256="", vocab_size=9
        )
        return budget_key(
            LoadedModel(build_tiny_model(tiny_tokenizer, **shape), tiny_tokenizer, identity, "cpu")
        )

    assert key("1" * 64) == key("2" * 64)
    assert key("1" * 64) != key("1" * 64, num_hidden_layers=3)
