"""How often the gate is right, by simulation: false promotions, power, and the coverage of its intervals.

    python bench/gate.py [SIMULATIONS]

A/A runs are answers of two models of equal skill, so that every promotion is a false one; 5 % are allowed.
Power is measured against McNemar's exact test, which sees the same 0/1 outcomes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tasks.core.config import GateConfig
from tasks.core.evaluation.comparison import compare_tables
from tasks.core.evaluation.figures import summarize_metrics
from tasks.core.evaluation.gate.case import GateInputs, NoiseFloor
from tasks.core.evaluation.gate.gate import decide
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import Decision, EvaluationSettings, RunSummary
from tasks.core.metrics.metric import FloatArray, Metric

BINARY = Metric("exact_match", "0 or 1", "simulated", kind="binary")
SHARE = Metric("f1", "between 0 and 1", "simulated")
REFUSALS = Metric("refusal_rate", "0 or 1", "simulated", kind="binary", direction="lower")
JSON = Metric("json_valid", "0 or 1", "simulated", kind="binary")
GATE = GateConfig()
ROWS_PER_QUESTION = 4
Draw = Callable[[np.random.Generator, int, float], tuple[ScoreTable, ScoreTable]]


def settings(resamples: int) -> EvaluationSettings:
    """Settings of an evaluation with that many resamples; more change little but the time."""
    return EvaluationSettings(
        metrics=("simulated",), error_rows="wrong", bootstrap_resamples=resamples, confidence=0.95, seed=1
    )


def table_of(
    scores: dict[Metric, FloatArray],
    questions: NDArray[np.integer] | None = None,
    empty: NDArray[np.bool_] | None = None,
) -> ScoreTable:
    """Scores of one run; `questions` tells which rows ask the same (none: all differ), `empty` which have no answer."""
    rows = len(next(iter(scores.values())))
    return ScoreTable(
        ids=tuple(str(i) for i in range(rows)),
        metrics=tuple(scores),
        values={metric.name: values for metric, values in scores.items()},
        statistics={
            m.name: np.stack([np.nan_to_num(values), np.isfinite(values).astype(float)], axis=1)
            for m, values in scores.items()
        },
        reasons={metric.name: [None] * rows for metric in scores},
        questions=(np.arange(rows) if questions is None else questions).astype(np.uint64),
        references=np.zeros(rows, np.uint64),
        errors=np.zeros(rows, bool),
        truncated=np.zeros(rows, bool),
        empty=np.zeros(rows, bool) if empty is None else empty.astype(bool),
        characters=np.ones(rows, np.int64),
    )


def run_of(name: str, table: ScoreTable, evaluation: EvaluationSettings) -> RunSummary:
    """A run's summary as the gate needs it."""
    return RunSummary(
        run_name=name,
        predictions_path="",
        predictions_sha256="",
        rows=table.row_count,
        distinct_questions=len(np.unique(table.questions)),
        error_rows=0,
        truncated_rows=0,
        metrics=summarize_metrics(table, evaluation.model_copy(update={"bootstrap_resamples": 100})),
    )


def verdict(candidate: ScoreTable, opponent: ScoreTable, resamples: int = 1000) -> Decision:
    """What the gate decides about two runs whose origin is in order."""
    evaluation = settings(resamples)
    inputs = GateInputs(
        candidate=run_of("candidate", candidate, evaluation),
        opponent=run_of("opponent", opponent, evaluation),
        comparison=compare_tables(candidate, opponent, evaluation),
        against="base",
        confidence=evaluation.confidence,
        noise=NoiseFloor(0.0, reason="simulated"),
        overlap="simulated",
    )
    return decide(inputs, candidate.metrics[0], GATE).decision


def binary_runs(random: np.random.Generator, rows: int, gain: float = 0.0) -> tuple[ScoreTable, ScoreTable]:
    """Two runs over questions of all difficulties; the first is right more often by about `gain`."""
    skill = random.beta(1, 1, rows)
    return tuple(  # type: ignore[return-value]
        table_of({BINARY: (random.random(rows) < np.clip(skill + g, 0, 1)).astype(float)}) for g in (gain, 0)
    )


def continuous_runs(
    random: np.random.Generator, rows: int, gain: float = 0.0
) -> tuple[ScoreTable, ScoreTable]:
    """The same with scores between 0 and 1, skewed as F1 is."""
    skill = random.beta(0.5, 1.5, rows)
    return tuple(  # type: ignore[return-value]
        table_of({SHARE: np.clip(skill + g + random.normal(0, 0.2, rows), 0, 1)}) for g in (gain, 0)
    )


def clustered_runs(
    random: np.random.Generator, rows: int, gain: float = 0.0
) -> tuple[ScoreTable, ScoreTable]:
    """Four rows a question, and each model has questions that it knows better: rows are not independent."""
    questions = np.repeat(np.arange(rows // ROWS_PER_QUESTION), ROWS_PER_QUESTION)
    skill = random.beta(1, 1, len(questions) // ROWS_PER_QUESTION)
    runs = []
    for g in (gain, 0.0):
        known = np.clip(skill + g + random.normal(0, 0.3, len(skill)), 0, 1)[questions]
        runs.append(table_of({BINARY: (random.random(len(questions)) < known).astype(float)}, questions))
    return runs[0], runs[1]


def guarded_runs(random: np.random.Generator, rows: int, gain: float = 0.0) -> tuple[ScoreTable, ScoreTable]:
    """A 0/1 primary metric with a continuous guard that goes along with it."""
    skill = random.beta(1, 1, rows)
    runs = []
    for g in (gain, 0.0):
        right = (random.random(rows) < np.clip(skill + g, 0, 1)).astype(float)
        runs.append(table_of({BINARY: right, SHARE: np.clip(right * 0.6 + random.random(rows) * 0.4, 0, 1)}))
    return runs[0], runs[1]


KINDS: dict[str, Draw] = {
    "0/1": binary_runs,
    "continuous": continuous_runs,
    "0/1, four rows a question": clustered_runs,
    "0/1 with a continuous guard": guarded_runs,
}


def decisions(draw: Draw, rows: int, gain: float, simulations: int) -> dict[Decision, float]:
    """Share of each verdict."""
    random = np.random.default_rng([rows, int(1000 * gain)])
    found = Counter(verdict(*draw(random, rows, gain)) for _ in range(simulations))
    return {decision: found[decision] / simulations for decision in ("promote", "reject", "inconclusive")}


def watched_runs(random: np.random.Generator, rows: int, gain: float = 0.0) -> tuple[ScoreTable, ScoreTable]:
    """0/1 runs in which five answers of a hundred are empty, refused and no JSON, alike in both."""
    skill = random.beta(1, 1, rows)
    runs = []
    for g in (gain, 0.0):
        right = (random.random(rows) < np.clip(skill + g, 0, 1)).astype(float)
        refused, valid = ((random.random(rows) < share).astype(float) for share in (0.05, 0.95))
        empty = random.random(rows) < 0.05
        runs.append(table_of({BINARY: right, REFUSALS: refused, JSON: valid}, empty=empty))
    return runs[0], runs[1]


def power_beside_mcnemar(
    rows: int, gain: float, simulations: int, draw: Draw | None = None
) -> tuple[float, float]:
    """Shares of simulations in which the gate promotes, and in which McNemar's test favours the candidate."""
    random = np.random.default_rng([rows, 7])
    promoted = significant = 0
    for _ in range(simulations):
        candidate, opponent = (draw or binary_runs)(random, rows, gain)
        changes = candidate.values[BINARY.name] - opponent.values[BINARY.name]
        wins, losses = int((changes > 0).sum()), int((changes < 0).sum())
        significant += wins > losses and binomtest(wins, wins + losses).pvalue <= 0.05
        promoted += verdict(candidate, opponent, resamples=200) == "promote"
    return promoted / simulations, significant / simulations


def coverage_of_difference(draw: Draw, rows: int, simulations: int) -> float:
    """How often the 95 % interval of the difference holds the truth, which is 0 in A/A runs."""
    random = np.random.default_rng([rows, 11])
    covered = 0
    for _ in range(simulations):
        candidate, opponent = draw(random, rows, 0.0)
        interval = compare_tables(candidate, opponent, settings(1000)).metrics[0].interval
        assert interval is not None
        covered += interval.low <= 0 <= interval.high
    return covered / simulations


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("simulations", type=int, nargs="?", default=2000)
    simulations: int = parser.parse_args().simulations
    sizes = (100, 400)
    print(f"{simulations} simulations each\n")
    print(f"{'A/A: false promotions (rejections)':<36}" + "".join(f"{rows:>12} rows" for rows in sizes))
    for name, draw in KINDS.items():
        cells = [decisions(draw, rows, 0.0, simulations) for rows in sizes]
        print(f"{name:<36}" + "".join(f"{c['promote']:>9.1%} ({c['reject']:.1%})" for c in cells))
    print(f"\n{'coverage of the 95 % interval of the':<36}\n{'difference':<36}", end="")
    print("".join(f"{rows:>12} rows" for rows in sizes))
    for name, draw in list(KINDS.items())[:3]:
        shares = [coverage_of_difference(draw, rows, simulations) for rows in sizes]
        print(f"{name:<36}" + "".join(f"{share:>17.1%}" for share in shares))
    print(f"\n{'power, 0/1, better by':<36}{'gate':>17}{'McNemar':>17}")
    for gain in (0.05, 0.1, 0.2):
        gate, test = power_beside_mcnemar(200, gain, simulations)
        print(f"{f'{gain:.2f}, 200 rows':<36}{gate:>17.1%}{test:>17.1%}")
    print(
        f"\n{'power with the default guards, rates':<36}\n{'of 5 % alike in both, better by 0.15':<36}",
        end="",
    )
    print(f"{'gate':>17}{'McNemar':>17}")
    for rows in (100, 200, 400, 1000):
        gate, test = power_beside_mcnemar(rows, 0.15, simulations, watched_runs)
        print(f"{f'{rows:,} rows':<36}{gate:>17.1%}{test:>17.1%}")


if __name__ == "__main__":
    main()
