"""Learned memory budgets are shared through a Prefect Variable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.variables import Variable

from tasks.core.generation.budget import FileBudgetStore, LearnedBudget
from tasks.memory_budgets import VARIABLE, PrefectBudgetStore

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", autouse=True)
def prefect_api() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path))
    return tmp_path


def test_a_budget_learned_by_one_worker_is_found_by_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrefectBudgetStore().save("model on cuda 80GiB", LearnedBudget(5000))
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "other-machine"))
    assert PrefectBudgetStore().load("model on cuda 80GiB") == LearnedBudget(5000)
    assert Variable.get(VARIABLE) == {"model on cuda 80GiB": {"limit_tokens": 5000}}


def test_what_only_the_file_knows_is_used_too() -> None:
    FileBudgetStore().save("model on cpu", LearnedBudget(70))
    assert PrefectBudgetStore().load("model on cpu") == LearnedBudget(70)
    assert PrefectBudgetStore().load("another model") is None


def test_a_server_that_is_away_costs_nothing_but_the_sharing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        PrefectBudgetStore().save("m", LearnedBudget(3))
        assert PrefectBudgetStore().load("m") == LearnedBudget(3)
    assert "kept in a file only" in caplog.text
