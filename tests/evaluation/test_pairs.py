"""Rows of two runs, side by side: the right partner in any order, and none held that comes in the same order."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator

from tasks.core.evaluation.pairs import Partners
from tasks.core.records import Prediction


def predictions(ids: list[int]) -> list[Prediction]:
    return [Prediction(id=str(i), question=f"question {i}", predicted_answer=f"answer {i}") for i in ids]


def test_each_row_finds_its_partner_whatever_the_order_and_whatever_else_is_there() -> None:
    ids = list(range(200))
    random.Random(3).shuffle(ids)
    partners = Partners(predictions(ids))
    for wanted in range(0, 200, 3):
        found = partners.of(str(wanted))
        assert found is not None and found.predicted_answer == f"answer {wanted}"
    assert partners.of("of no run") is None
    after = partners.of("1")
    assert after is not None and after.id == "1"  # what was passed by is not lost


def test_rows_in_the_same_order_are_not_held() -> None:
    alive: weakref.WeakSet[Marked] = weakref.WeakSet()

    def others() -> Iterator[Prediction]:
        for i in range(1000):
            row = Marked(id=str(i), question="q")
            alive.add(row)
            yield row

    partners, most = Partners(others()), 0
    for i in range(1000):
        found = partners.of(str(i))
        assert found is not None and found.id == str(i)
        most = max(most, len(alive))
    assert most <= 3


class Marked(Prediction):
    """One that can be counted."""

    def __hash__(self) -> int:
        return id(self)
