"""Many nights against one champion on one test set, by simulation: false promotions, claimed and true gains, drift.

    python bench/nights.py [--lines 400]

A line is 30 or 90 nights. Each night a candidate answers the same rows; a promoted one is the champion of the nights
after it. Candidates are *equal* (each question is answered rightly with the champion's own probability), *inherited*
(equal, but seven answers of ten are the champion's own, as when each night goes on from the same model), or *spread*
(each has strengths of its own, and their true gains are normal around the first champion with a standard deviation of
one point). A promotion is false when the promoted model is truly no better than the champion it replaces. The old rule
asks p <= 0.05 of every night, the new one what `nights.allowed_p_value` gives; both by McNemar's exact test, as the
gate tests 0/1 metrics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.core.evaluation.nights import Look, allowed_p_value, expected_difference
from tasks.core.evaluation.statistics import mcnemar_p_value

Kind = Literal["equal", "inherited", "spread"]
Skill = NDArray[np.float64]
Rule = Callable[[int], float]
KINDS: tuple[Kind, ...] = ("equal", "inherited", "spread")
OWN_STRENGTHS = 0.15
KEPT_ANSWERS = 0.7
RULES: dict[str, Rule] = {
    "old": lambda number: 0.05,
    "new": lambda number: allowed_p_value(number, 30, 0.95, "champion"),
}
TRUE_GAIN = 0.05


@dataclass
class Found:
    """Sums over lines."""

    lines: int = 0
    with_false: int = 0
    promotions: int = 0
    claimed: float = 0.0
    expected: float = 0.0
    true: float = 0.0
    drift: list[float] = field(default_factory=list)

    def row(self) -> str:
        """One line of the table, gains and drift in points."""
        per = max(1, self.promotions)
        gains = "".join(f"{100 * total / per:>10.1f}" for total in (self.claimed, self.expected, self.true))
        return f"{self.with_false / self.lines:>9.1%}{self.promotions / self.lines:>8.2f}{gains}" + (
            f"{100 * float(np.mean(self.drift)):>8.1f}"
        )


@cache
def p_value(wins: int, losses: int) -> float:
    """McNemar's exact test, kept: the same counts come again and again."""
    return mcnemar_p_value(wins, losses)


def of_mean(skill: Skill, mean: float) -> Skill:
    """The probabilities, moved so that their mean is `mean` although they end at 0 and 1."""
    for _ in range(20):
        skill = np.clip(skill + mean - skill.mean(), 0, 1)
    return skill


def candidate_of(
    random: np.random.Generator, kind: Kind, base: Skill, champion: Skill, first: float
) -> Skill:
    """Probability of a right answer, question by question."""
    if kind != "spread":
        return champion
    skill = np.clip(base + random.normal(0, OWN_STRENGTHS, len(base)), 0, 1)
    return of_mean(skill, first + random.normal(0, 0.01))


def answers_of(
    random: np.random.Generator, kind: Kind, skill: Skill, before: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which rows are answered rightly, of the champion's answers `before` some kept where they are inherited."""
    anew = random.random(len(skill)) < skill
    if kind != "inherited":
        return anew
    return np.where(random.random(len(skill)) < KEPT_ANSWERS, before, anew)


def look(night: int, difference: float, changed: float, rows: int, p: float) -> Look:
    """What the book keeps of a night."""
    error = float(np.sqrt(max(0.0, changed - difference**2) / rows))
    return Look(
        at="", opponent="", opponent_run="", candidate=str(night), candidate_run="", row_count=rows, rows=(),
        metric="exact_match", difference=difference, standard_error=error, p_value=p,
    )  # fmt: skip


def line(random: np.random.Generator, kind: Kind, rows: int, nights: int, rule: Rule, found: Found) -> None:
    """One line of nights, added to what was found."""
    base = random.beta(1, 1, rows)
    champion = of_mean(np.clip(base + random.normal(0, OWN_STRENGTHS, rows), 0, 1), float(base.mean()))
    first, was_false = float(champion.mean()), False
    right, looks = random.random(rows) < champion, []
    for night in range(1, nights + 1):
        skill = candidate_of(random, kind, base, champion, first)
        answered = answers_of(random, kind, skill, right)
        wins, losses = int((answered & ~right).sum()), int((right & ~answered).sum())
        p = p_value(wins, losses)
        seen = look(night, (wins - losses) / rows, (wins + losses) / rows, rows, p)
        looks.append(seen)
        if wins > losses and p <= rule(len(looks)):
            gain = float(skill.mean() - champion.mean())
            was_false |= gain <= 1e-9
            found.promotions += 1
            found.claimed += seen.difference or 0.0
            found.expected += expected_difference(seen, looks) or 0.0
            found.true += gain
            champion, right, looks = skill, answered, []
    found.lines += 1
    found.with_false += was_false
    found.drift.append(float(champion.mean()) - first)


def chance_to_take(
    random: np.random.Generator, kind: Kind, rows: int, nights: int, rule: Rule, lines: int
) -> float:
    """How often a candidate that is truly better by five points, on a night drawn by lot, is promoted that night."""
    taken = 0
    for _ in range(lines):
        base = random.beta(1, 1, rows)
        champion = of_mean(np.clip(base + random.normal(0, OWN_STRENGTHS, rows), 0, 1), float(base.mean()))
        right = random.random(rows) < champion
        skill = candidate_of(random, kind, base, champion, float(champion.mean()))
        gained = of_mean(
            skill, float(champion.mean()) + TRUE_GAIN / (1 - KEPT_ANSWERS * (kind == "inherited"))
        )
        answered = answers_of(random, kind, gained, right)
        wins, losses = int((answered & ~right).sum()), int((right & ~answered).sum())
        taken += wins > losses and p_value(wins, losses) <= rule(int(random.integers(1, nights + 1)))
    return taken / lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--nights", type=int, nargs="+", default=[30, 90])
    chosen = parser.parse_args()
    print(f"{chosen.lines} lines each; false: lines with a false promotion; promoted: promotions a line;")
    print(
        "claimed, to expect, true: mean gain of promotions in points; drift: the last champion's true gain\n"
    )
    print(
        f"{'candidates':<11}{'nights':>7}{'rows':>6} {'rule':<5}{'false':>8}{'promoted':>9}"
        f"{'claimed':>9}{'to expect':>10}{'true':>10}{'drift':>8}{'takes +5':>10}"
    )
    for kind in KINDS:
        for nights in chosen.nights:
            for rows in chosen.rows:
                for name, rule in RULES.items():
                    random = np.random.default_rng([nights, rows, KINDS.index(kind)])
                    found = Found()
                    for _ in range(chosen.lines):
                        line(random, kind, rows, nights, rule, found)
                    power = chance_to_take(random, kind, rows, nights, rule, chosen.lines)
                    print(f"{kind:<11}{nights:>7}{rows:>6} {name:<5}{found.row()}{power:>10.0%}", flush=True)


if __name__ == "__main__":
    main()
