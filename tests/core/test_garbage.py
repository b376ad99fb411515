"""Where Python looks for reference cycles, and where it does not."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tasks.core.garbage import uncollected
from tasks.core.models import libraries


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    frozen = gc.get_freeze_count()
    yield
    if not frozen:
        gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_is_as_it_was_after_the_block_also_when_that_raises(before: bool) -> None:
    if not before:
        gc.disable()
    with pytest.raises(ZeroDivisionError), uncollected():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled() is before


def test_only_what_is_frozen_is_never_looked_at_again() -> None:
    with uncollected():
        loaded = [[number] for number in range(1000)]
    assert any(one is loaded for one in gc.get_objects())
    with uncollected(frozen=True):
        pass
    assert not any(one is loaded for one in gc.get_objects())


def test_a_child_imports_its_libraries_without_looking_for_cycles_and_never_looks_at_them_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(libraries, "import_model_libraries", lambda: seen.append(gc.isenabled()))
    gc.enable()
    frozen = gc.get_freeze_count()
    kept = [[number] for number in range(1000)]
    libraries.import_in_child()
    assert seen == [False] and gc.isenabled()
    assert gc.get_freeze_count() > frozen and not any(one is kept for one in gc.get_objects())
