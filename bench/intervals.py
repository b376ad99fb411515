"""Whether the intervals and tests keep their promise, by simulation, and how long they take.

    python bench/intervals.py [RUNS]

Coverage: how often the 95 % interval holds the true figure (wanted: 93 to 97 %).
A/A: how often two equally good runs are told apart (wanted: at most 5 %).
Power: how often a true difference is found, by the comparison (interval and p value) and by the p value alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.core.evaluation.comparison import compare_tables
from tasks.core.evaluation.figures import summarize_metrics
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import EvaluationSettings, MetricComparison
from tasks.core.metrics.metric import FloatArray, Metric

BINARY = Metric("binary", "a 0/1 metric", "simulation", kind="binary")
SHARE = Metric("share", "a metric between 0 and 1", "simulation")
SETTINGS = EvaluationSettings(
    metrics=(), error_rows="wrong", bootstrap_resamples=2000, confidence=0.95, seed=42
)

Draw = Callable[[np.random.Generator, int], FloatArray]
SAMPLES: dict[str, tuple[Draw, float]] = {
    "right in 5 %": (lambda random, n: (random.random(n) < 0.05).astype(float), 0.05),
    "right in 30 %": (lambda random, n: (random.random(n) < 0.3).astype(float), 0.3),
    "right in 95 %": (lambda random, n: (random.random(n) < 0.95).astype(float), 0.95),
    "skewed scores": (lambda random, n: random.beta(0.5, 1.5, n), 0.25),
    "mostly zero": (lambda random, n: random.beta(2, 2, n) * (random.random(n) < 0.2), 0.1),
}


def table_of(metric: Metric, values: FloatArray, questions: NDArray[np.uint64] | None = None) -> ScoreTable:
    """A table of one metric with the given values, every row another question unless `questions` says which."""
    count = len(values)
    return ScoreTable(
        ids=tuple(map(str, range(count))),
        metrics=(metric,),
        values={metric.name: values},
        statistics={metric.name: np.stack([values, np.ones(count)], axis=1)},
        reasons={metric.name: [None] * count},
        questions=np.arange(count, dtype=np.uint64) if questions is None else questions,
        references=np.zeros(count, dtype=np.uint64),
        errors=np.zeros(count, dtype=bool),
        truncated=np.zeros(count, dtype=bool),
        empty=np.zeros(count, dtype=bool),
        characters=np.ones(count, dtype=np.int64),
    )


def coverage(draw: Draw, truth: float, rows: int, runs: int) -> float:
    """Share of simulated runs whose interval holds the truth."""
    random = np.random.default_rng(rows)
    held = 0
    for _ in range(runs):
        interval = summarize_metrics(table_of(BINARY, draw(random, rows)), SETTINGS)[0].interval
        held += interval is not None and interval.low <= truth <= interval.high
    return held / runs


def compare(metric: Metric, candidate: FloatArray, baseline: FloatArray) -> MetricComparison:
    """The comparison of two simulated runs."""
    return compare_tables(table_of(metric, candidate), table_of(metric, baseline), SETTINGS).metrics[0]


def decisions(metric: Metric, gain: float, rows: int, runs: int) -> tuple[float, float]:
    """Shares of runs in which the comparison, and the p value, find a difference; questions differ in difficulty."""
    random = np.random.default_rng(rows + 1)
    by_comparison = by_test = 0
    for _ in range(runs):
        skill = random.beta(1, 1, rows)
        if metric is BINARY:
            baseline = (random.random(rows) < skill).astype(float)
            candidate = (random.random(rows) < np.minimum(skill + gain, 1)).astype(float)
        else:
            baseline, candidate = (np.clip(skill + g + random.normal(0, 0.2, rows), 0, 1) for g in (0, gain))
        found = compare(metric, candidate, baseline)
        by_comparison += found.better != "undecided"
        by_test += found.p_value is not None and found.p_value < 0.05
    return by_comparison / runs, by_test / runs


def coverage_with_a_heavy_question(rows: int, share: float, alike: bool, runs: int) -> float:
    """How often the interval of two equal models' difference holds 0, where one question has a `share` of the rows.

    `alike`: a model gives the same answer whenever it is asked that question.
    """
    random = np.random.default_rng([rows, round(100 * share), alike])
    heavy, held = round(share * rows), 0
    questions = np.concatenate([np.zeros(heavy), np.arange(1, rows - heavy + 1)]).astype(np.uint64)
    for _ in range(runs):
        difficulty = random.beta(1, 1, rows)
        tables: list[ScoreTable] = []
        for _ in range(2):
            skill = np.clip(difficulty + random.normal(0, 0.3, rows), 0, 1)
            skill[:heavy] = skill[0]
            values = (random.random(rows) < skill).astype(float)
            if alike:
                values[:heavy] = values[0]
            tables.append(table_of(BINARY, values, questions))
        interval = compare_tables(tables[0], tables[1], SETTINGS).metrics[0].interval
        held += interval is not None and interval.low <= 0 <= interval.high
    return held / runs


def main() -> None:
    """Print coverage, false alarms, power and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", type=int, nargs="?", default=1000)
    runs: int = parser.parse_args().runs
    print(
        f"{runs} simulations each\n{'coverage of the 95 % interval':<34}{'50 rows':>9}{'200 rows':>9}{'1000 rows':>10}"
    )
    for name, (draw, truth) in SAMPLES.items():
        shares = [coverage(draw, truth, rows, runs) for rows in (50, 200, 1000)]
        print(f"{name:<34}" + "".join(f"{share:>9.1%}" for share in shares))
    print(f"\n{'differences found in 200 rows':<30}{'comparison':>13}{'p value':>9}")
    for metric in (BINARY, SHARE):
        for gain in (0.0, 0.05, 0.1):
            told, test = decisions(metric, gain, 200, runs)
            print(
                f"{metric.name + (' A/A' if gain == 0 else f', better by {gain:.2f}'):<34}{told:>9.1%}{test:>9.1%}"
            )
    print(f"\n{'coverage with one heavy question':<34}{'100 rows':>17}{'400 rows':>17}")
    for share in (0.05, 0.11, 0.2, 0.4):
        for alike, how in ((False, "own answers"), (True, "the same answer")):
            shares = [coverage_with_a_heavy_question(rows, share, alike, runs) for rows in (100, 400)]
            print(f"{f'{share:.0%} of the rows, {how}':<34}" + "".join(f"{found:>17.1%}" for found in shares))
    random = np.random.default_rng(0)
    tables = [table_of(SHARE, random.random(10_000)) for _ in range(2)]
    start = time.perf_counter()
    compare_tables(tables[0], tables[1], SETTINGS.model_copy(update={"bootstrap_resamples": 10_000}))
    print(f"\n10,000 resamples and swaps over 10,000 rows: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
