"""Learned memory budgets are shared through a Prefect Variable."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from prefect.variables import Variable

from tasks.core.memory.budget import FileBudgetStore, LearnedBudget
from tasks.memory_budgets import VARIABLE, PrefectBudgetStore
from tests.making.warm.children import warm_children  # noqa: F401

pytestmark = pytest.mark.server


@pytest.fixture(autouse=True)
def nothing_learned(prefect_api: str) -> Iterator[None]:
    """The variable is not there before a test nor after it: flows of other files read it too."""
    Variable.unset(VARIABLE)
    yield
    Variable.unset(VARIABLE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path))
    return tmp_path


def test_a_budget_learned_by_one_worker_is_found_by_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrefectBudgetStore().save("model on cuda 80GiB", LearnedBudget(5000, 10_000))
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "other-machine"))
    assert PrefectBudgetStore().load("model on cuda 80GiB") == LearnedBudget(5000, 10_000)
    kept = Variable.get(VARIABLE)
    assert isinstance(kept, dict)
    assert list(kept) == ["model on cuda 80GiB"]


def test_as_many_budgets_are_kept_as_a_variable_holds(caplog: pytest.LogCaptureFixture) -> None:
    names = [
        f"LlamaForCausalLM {n:012d} bfloat16 none cuda:0 79.2GiB torch2.9 transformers5.1" for n in range(60)
    ]
    entries = {
        name: {"limit_tokens": 10**8, "failed_tokens": 10**9, "saved_at": n} for n, name in enumerate(names)
    }
    Variable.set(VARIABLE, dict(list(entries.items())[:25]), overwrite=True)
    for name in names[25:35]:
        PrefectBudgetStore().save(name, LearnedBudget(10**8, 10**9))
    kept = Variable.get(VARIABLE)
    assert isinstance(kept, dict)
    assert set(names[25:35]) < set(kept)
    assert 20 < len(kept) <= 30
    assert names[0] not in kept
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_value_that_prefect_refuses_costs_nothing_but_the_sharing(caplog: pytest.LogCaptureFixture) -> None:
    PrefectBudgetStore().save("a name too long " * 400, LearnedBudget(5))
    assert PrefectBudgetStore().load("a name too long " * 400) == LearnedBudget(5)
    assert "kept in a file only" in caplog.text


def test_a_damaged_variable_counts_as_nothing_learned() -> None:
    Variable.set(VARIABLE, {"m": [1, 2], "n": {"limit": 3}}, overwrite=True)
    assert PrefectBudgetStore().load("m") is None
    assert PrefectBudgetStore().load("n") is None
    PrefectBudgetStore().save("m", LearnedBudget(4))
    assert PrefectBudgetStore().load("m") == LearnedBudget(4)


def test_what_only_the_file_knows_is_used_too() -> None:
    FileBudgetStore().save("model on cpu", LearnedBudget(70))
    assert PrefectBudgetStore().load("model on cpu") == LearnedBudget(70)
    assert PrefectBudgetStore().load("another model") is None


def test_a_server_that_is_away_costs_nothing_but_the_sharing() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        PrefectBudgetStore().save("m", LearnedBudget(3))
        assert PrefectBudgetStore().load("m") == LearnedBudget(3)


def load_in_a_child(store: PrefectBudgetStore) -> tuple[LearnedBudget | None, int]:
    """What a generating child finds, and how many processes it started for that."""
    import psutil

    return store.load("model on cpu"), len(psutil.Process().children(recursive=True))


@pytest.mark.usefixtures("warm_children")
def test_a_child_without_a_server_of_its_own_reads_the_file_and_starts_none(cache: Path) -> None:
    store = PrefectBudgetStore()
    store.save("model on cpu", LearnedBudget(700, 900))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(load_in_a_child, store).result() == (LearnedBudget(700, 900), 0)
