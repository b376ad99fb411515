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
    assert repeats == {0: [20], 10: [30]}


def test_different_prompts_with_one_digest_are_all_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hash", lambda data: 7, raising=False)
    positions, repeats = stored(tmp_path / "prompts").first_of_equals()
    asked = {*positions.tolist(), *(repeat for group in repeats.values() for repeat in group)}
    assert asked == {0, 10, 20, 30, 40}
    assert all(TOKENS[first // 10] == TOKENS[repeat // 10] for first in repeats for repeat in repeats[first])
