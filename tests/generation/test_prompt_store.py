"""Prompts kept on disk: equal ones are found, different ones never taken for equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.generation import prompt_store as module
from tasks.core.generation.prompt_store import PromptStore
from tasks.core.records import Prompt

TOKENS = [(1, 2), (3,), (1, 2), (3,), (4, 5)]


def stored(path: Path) -> PromptStore:
    store = PromptStore(path)
    store.write((10 * place, Prompt(str(place), tokens)) for place, tokens in enumerate(TOKENS))
    return store


def test_equal_prompts_are_asked_once_and_answered_all(tmp_path: Path) -> None:
    positions, repeats = stored(tmp_path / "prompts").first_of_equals()
    assert positions.tolist() == [0, 10, 40]
    assert [repeats.of(position) for position in (0, 10, 40)] == [[20], [30], []]


def test_pairs_of_equal_prompts_cost_few_bytes_a_row(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "prompts")
    store.write((place, Prompt(str(place), (place // 2, 1))) for place in range(2000))
    positions, repeats = store.first_of_equals()
    assert positions.tolist() == list(range(0, 2000, 2))
    assert [repeats.of(place) for place in positions.tolist()] == [[place + 1] for place in positions]
    assert repeats.firsts.nbytes + repeats.repeats.nbytes == 16 * 1000


def test_different_prompts_with_one_digest_are_all_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hash", lambda data: 7, raising=False)
    positions, repeats = stored(tmp_path / "prompts").first_of_equals()
    assert {*positions.tolist(), *repeats.repeats.tolist()} == {0, 10, 20, 30, 40}
    pairs = zip(repeats.firsts, repeats.repeats, strict=True)
    assert all(TOKENS[first // 10] == TOKENS[repeat // 10] for first, repeat in pairs)
