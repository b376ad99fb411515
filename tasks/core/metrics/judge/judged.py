"""How a judge scores a metric: what it is asked, what people label to compare it with them, what the order changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.core.metrics.judge.prompts import JudgePrompt, Texts, Verdict


@dataclass(frozen=True, slots=True)
class Bias:
    """What a judge favours: a named figure, and what it is without a bias. `is_share`: it is told in percent."""

    name: str
    value: float
    unbiased: float
    is_share: bool = False


@dataclass(frozen=True, slots=True)
class PositionBias:
    """What the judge does when the two texts change places: `changed` of `rows` verdicts change with the order."""

    rows: int
    changed: int
    first: Bias | None


@dataclass(frozen=True, slots=True)
class BothOrders:
    """A metric whose judge is asked twice about two texts, which change places.

    `prompts` takes question, answer, the other answer (empty where the metric has none) and references. `value` is
    that of the verdicts on both; `bias` takes those of all rows.
    """

    prompts: Callable[[str, str, str, Texts], list[JudgePrompt]]
    value: Callable[[Sequence[Verdict]], float]
    bias: Callable[[Sequence[Sequence[Verdict]]], PositionBias]


@dataclass(frozen=True, slots=True)
class Judged:
    """What must be known of a judged metric besides its scores, to compare its judge with people.

    `asks` is what the judge is asked of no row in particular: its digest tells one way of judging from another.
    A row that a person labels has a reference unless it need not; with `of_two_answers` it has two answers, and the
    label says which is better. `top_rating`: labels may be ratings from 0 to this.
    """

    asks: Callable[[], JudgePrompt]
    labels_need_reference: bool = True
    of_two_answers: bool = False
    top_rating: int | None = None
    orders: BothOrders | None = None
