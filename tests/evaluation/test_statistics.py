"""Intervals, tests and paired comparisons: equal to scipy, honest about coverage, fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from scipy import stats as scipy_stats

from tasks.core.errors import EvaluationError
from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.comparison import compare_tables
from tasks.core.evaluation.figures import summarize_metrics
from tasks.core.evaluation.scoring import ScoreTable, score_predictions
from tasks.core.evaluation.summary import EvaluationSettings, MetricComparison
from tasks.core.metrics.catalogue import resolve
from tasks.core.metrics.metric import MEAN, FloatArray, Metric
from tasks.core.records import Prediction

BINARY = Metric("binary", "a 0/1 metric", "test", kind="binary")
SHARE = Metric("share", "a metric between 0 and 1", "test")


def settings(resamples: int = 2000, confidence: float = 0.95) -> EvaluationSettings:
    return EvaluationSettings(
        metrics=("test",), error_rows="wrong", bootstrap_resamples=resamples, confidence=confidence, seed=42
    )


def table_of(metric: Metric, values: FloatArray, questions: FloatArray | None = None) -> ScoreTable:
    scored = ~np.isnan(values)
    count = len(values)
    return ScoreTable(
        ids=tuple(str(i) for i in range(count)),
        metrics=(metric,),
        values={metric.name: values.astype(float)},
        statistics={metric.name: np.stack([np.where(scored, values, 0.0), scored.astype(float)], axis=1)},
        reasons={metric.name: [None if ok else "no reference" for ok in scored]},
        questions=np.arange(count, dtype=np.uint64) if questions is None else questions.astype(np.uint64),
        references=np.zeros(count, dtype=np.uint64),
        errors=np.zeros(count, dtype=bool),
        truncated=np.zeros(count, dtype=bool),
        empty=np.zeros(count, dtype=bool),
        characters=np.ones(count, dtype=np.int64),
    )


def compare(metric: Metric, candidate: FloatArray, baseline: FloatArray, **options: int) -> MetricComparison:
    return compare_tables(
        table_of(metric, candidate), table_of(metric, baseline), settings(**options)
    ).metrics[0]


def test_the_interval_of_a_mean_equals_scipys_bca_bootstrap() -> None:
    values = np.random.default_rng(1).beta(0.6, 2.0, size=400)
    ours = summarize_metrics(table_of(SHARE, values), settings(20_000))[0]
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2)
    )
    assert ours.interval is not None
    assert ours.interval.method == "BCa bootstrap"
    standard_error = theirs.standard_error
    assert ours.interval.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * standard_error)
    assert ours.interval.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * standard_error)


def test_the_bca_formula_equals_scipys_on_the_same_resamples() -> None:
    random = np.random.default_rng(3)
    values = random.exponential(size=60)
    draws = values[random.integers(0, 60, size=(4000, 60))].mean(axis=1)
    jackknife = (values.sum() - values) / 59
    ours = stats.bca_interval(values.mean(), draws, jackknife, 0.9)
    # scipy takes resamples made before and redoes the interval; zero new ones are added.
    made = scipy_stats.bootstrap((values,), np.mean, n_resamples=1, method="basic", confidence_level=0.9)
    made.bootstrap_distribution = draws
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=0, method="BCa", confidence_level=0.9, bootstrap_result=made
    )
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)


def test_a_resample_has_as_many_rows_as_the_sample() -> None:
    ones = np.ones((50, 1))
    assert (stats.bootstrap_sums(ones, resamples=300, seed=0) == 50).all()


def test_resamples_vary_as_a_sum_of_drawn_rows_does() -> None:
    values = np.random.default_rng(4).normal(size=(500, 1))
    draws = stats.bootstrap_sums(values, resamples=20_000, seed=1)[:, 0] / 500
    assert draws.mean() == pytest.approx(values.mean(), abs=4 * values.std() / np.sqrt(500 * 20_000))
    assert draws.std() == pytest.approx(values.std() / np.sqrt(500), rel=0.03)


@pytest.mark.parametrize(
    ("sample", "truth"),
    [
        (lambda random, n: (random.random(n) < 0.3).astype(float), 0.3),
        (lambda random, n: random.beta(0.5, 1.5, n), 0.25),
    ],
    ids=["binary", "skewed"],
)
def test_95_percent_intervals_cover_the_truth_93_to_97_percent_of_the_time(
    sample: Callable[[np.random.Generator, int], FloatArray], truth: float
) -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(600):
        table = table_of(BINARY, sample(random, 150))
        interval = summarize_metrics(table, settings(600))[0].interval
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    assert 0.925 <= covered / 600 <= 0.975


def test_a_perfect_score_has_an_interval_of_more_than_zero_width() -> None:
    summary = summarize_metrics(table_of(BINARY, np.ones(100)), settings())[0]
    assert summary.interval is not None
    assert summary.interval.high == 1.0
    exact = scipy_stats.binomtest(100, 100).proportion_ci(0.95, method="exact")
    assert summary.interval.low == pytest.approx(exact.low)
    assert summary.interval.method == "no variation"


def test_perfect_corpus_figures_have_the_interval_of_a_perfect_mean() -> None:
    texts = [f"the quick brown fox jumps over dog {i}" for i in range(5)]
    rows = [
        Prediction(id=str(i), question=str(i), predicted_answer=text, ground_truth=text)
        for i, text in enumerate(texts)
    ]
    table = score_predictions(rows, resolve(["f1", "bleu_score", "chrf"]))
    mean, *corpus = summarize_metrics(table, settings())
    assert mean.interval is not None and mean.interval.low == pytest.approx(0.025 ** (1 / 5))
    assert [(metric.value, metric.interval) for metric in corpus] == [(1.0, mean.interval)] * 2
    for compared in compare_tables(table, table, settings()).metrics:
        assert compared.interval is not None and compared.interval.low < 0 < compared.interval.high


def test_a_single_question_tells_next_to_nothing() -> None:
    table = table_of(SHARE, np.array([0.2, 0.9, 0.4]), np.zeros(3))
    interval = summarize_metrics(table, settings())[0].interval
    assert interval is not None
    assert interval.high - interval.low > 0.9


def test_the_interval_of_corpus_bleu_is_of_the_corpus_figure() -> None:
    random = np.random.default_rng(6)
    words = np.array(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
    references = [" ".join(random.choice(words, 9)) for _ in range(80)]
    answers = [
        " ".join(w if random.random() < 0.7 else "other" for w in reference.split())
        for reference in references
    ]
    rows = [
        Prediction(id=str(i), question=str(i), predicted_answer=answer, ground_truth=reference)
        for i, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]
    summary = summarize_metrics(score_predictions(rows, resolve(["bleu_score"])), settings())[0]
    drawn = [random.integers(0, 80, 80) for _ in range(300)]
    library = [
        sacrebleu.corpus_bleu([answers[i] for i in draw], [[references[i] for i in draw]]).score / 100
        for draw in drawn
    ]
    assert summary.value == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score / 100, abs=1e-9)
    assert summary.interval is not None
    spread = np.std(library)
    assert summary.interval.low == pytest.approx(np.quantile(library, 0.025), abs=0.6 * spread)
    assert summary.interval.high == pytest.approx(np.quantile(library, 0.975), abs=0.6 * spread)


def test_rows_of_equal_questions_widen_the_interval_as_fewer_independent_rows_do() -> None:
    values = np.random.default_rng(7).random(60)
    once = summarize_metrics(table_of(SHARE, values), settings())[0].interval
    repeated = np.repeat(values, 8)
    naive = summarize_metrics(table_of(SHARE, repeated), settings())[0].interval
    clustered_table = table_of(SHARE, repeated, np.repeat(np.arange(60), 8))
    clustered = summarize_metrics(clustered_table, settings())[0].interval
    assert once is not None and naive is not None and clustered is not None
    width = once.high - once.low
    assert clustered.high - clustered.low == pytest.approx(width, rel=0.1)
    assert naive.high - naive.low < 0.5 * width


def test_a_better_candidate_wins_and_the_tally_adds_up() -> None:
    baseline = np.zeros(100)
    candidate = np.zeros(100)
    candidate[:40] = 1
    baseline[95:] = 1
    found = compare(BINARY, candidate, baseline)
    assert found.better == "candidate"
    assert (found.wins, found.ties, found.losses) == (40, 55, 5)
    assert found.difference == pytest.approx(0.35)
    assert found.interval is not None
    assert 0 < found.interval.low < 0.35 < found.interval.high


def test_p_value_of_a_binary_metric_is_mcnemars_exact_one() -> None:
    candidate, baseline = np.zeros(50), np.zeros(50)
    candidate[:9] = 1
    baseline[9:12] = 1
    found = compare(BINARY, candidate, baseline)
    assert found.p_value_method == "McNemar exact"
    assert found.p_value == pytest.approx(scipy_stats.binomtest(9, 12).pvalue, abs=1e-9)


def test_p_value_of_a_continuous_metric_equals_scipys_permutation_test() -> None:
    random = np.random.default_rng(8)
    baseline = random.random(60)
    candidate = baseline + random.normal(0.03, 0.1, 60)
    found = compare(SHARE, candidate, baseline, resamples=20_000)
    theirs = scipy_stats.permutation_test(
        (candidate, baseline),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(9),
    )
    assert found.p_value_method == "paired randomisation"
    assert found.p_value == pytest.approx(theirs.pvalue, abs=0.01)


def test_the_same_answers_give_no_winner_and_an_interval_around_zero() -> None:
    values = (np.arange(80) % 3 == 0).astype(float)
    found = compare(BINARY, values, values)
    assert found.better == "undecided"
    assert found.difference == 0
    assert found.p_value == 1.0
    assert found.interval is not None
    assert found.interval.low < 0 < found.interval.high


@pytest.mark.parametrize("metric", [BINARY, SHARE], ids=["binary", "continuous"])
def test_two_runs_of_equal_quality_are_told_apart_at_most_about_5_percent_of_the_time(metric: Metric) -> None:
    random = np.random.default_rng(10)
    decided = significant = 0
    for _ in range(400):
        skill = random.beta(1, 1, 120)
        runs = [
            (random.random(120) < skill).astype(float)
            if metric is BINARY
            else skill + random.normal(0, 0.2, 120)
            for _ in range(2)
        ]
        found = compare(metric, runs[0], runs[1], resamples=500)
        decided += found.better != "undecided"
        significant += found.p_value is not None and found.p_value < 0.05
    assert decided / 400 <= 0.08
    assert significant / 400 <= 0.07


@pytest.mark.parametrize("rows", [5, 12])
def test_on_few_rows_two_runs_of_equal_quality_are_told_apart_at_most_5_percent_of_the_time(
    rows: int,
) -> None:
    random = np.random.default_rng(18)
    decided = 0
    for _ in range(300):
        skill = random.beta(1, 1, rows)
        runs = [np.clip(skill + random.normal(0, 0.2, rows), 0, 1) for _ in range(2)]
        decided += compare(SHARE, runs[0], runs[1], resamples=500).better != "undecided"
    assert decided / 300 <= 0.06


def test_an_interval_beside_0_with_a_large_p_value_is_no_finding() -> None:
    candidate, baseline = np.zeros(100), np.zeros(100)
    candidate[:5] = 1
    found = compare(BINARY, candidate, baseline)
    assert found.interval is not None and found.p_value is not None
    assert found.interval.low > 0 and found.p_value > 0.05
    assert found.better == "undecided"


def test_a_paired_comparison_sees_what_separate_intervals_hide() -> None:
    random = np.random.default_rng(11)
    baseline = random.random(200)
    candidate = baseline + 0.02 + random.normal(0, 0.02, 200)
    found = compare(SHARE, candidate, baseline)
    assert found.better == "candidate"
    first, second = (summarize_metrics(table_of(SHARE, run), settings())[0] for run in (baseline, candidate))
    assert first.interval is not None and second.interval is not None
    assert first.interval.high > second.interval.low


def test_where_lower_is_better_a_lower_candidate_wins() -> None:
    metric = Metric("rate", "lower is better", "test", direction="lower")
    found = compare(metric, np.full(60, 0.2) + np.arange(60) / 1000, np.full(60, 0.6))
    assert found.better == "candidate"
    assert (found.wins, found.losses) == (60, 0)
    assert found.difference is not None and found.difference < 0


def test_a_metric_without_a_direction_has_no_winner() -> None:
    metric = Metric("length", "just a number", "test", direction="none", maximum=float("inf"))
    random = np.random.default_rng(12)
    found = compare(metric, random.random(50) + 10, random.random(50))
    assert found.better == "undecided"
    assert found.wins is None and found.losses is None
    assert found.interval is not None and found.interval.low > 9


def test_rows_that_one_side_did_not_score_are_left_out_of_the_comparison() -> None:
    candidate, baseline = np.ones(10), np.zeros(10)
    candidate[0] = baseline[1] = np.nan
    found = compare(BINARY, candidate, baseline)
    assert found.rows == 8
    assert (found.candidate, found.baseline) == (1.0, 0.0)


def test_rows_are_paired_by_id_and_the_others_counted() -> None:
    random = np.random.default_rng(13)
    whole = table_of(SHARE, random.random(40))
    part = table_of(SHARE, whole.values["share"][::-1].copy())
    part = replace(part, ids=tuple(str(i) for i in reversed(range(40))))
    reversed_run = compare_tables(whole, part, settings()).metrics[0]
    assert reversed_run.ties == 40
    shifted = replace(whole, ids=tuple(str(i + 10) for i in range(40)))
    comparison = compare_tables(whole, shifted, settings())
    assert (comparison.paired_rows, comparison.only_candidate_rows, comparison.only_baseline_rows) == (
        30,
        10,
        10,
    )


def test_runs_that_share_too_few_rows_are_refused_with_the_counts() -> None:
    whole = table_of(SHARE, np.linspace(0, 1, 40))
    shifted = replace(whole, ids=tuple(str(i + 30) for i in range(40)))
    with pytest.raises(EvaluationError, match=r"only 10 rows are in both runs \(candidate 40, baseline 40\)"):
        compare_tables(whole, shifted, settings())


def test_holm_adjusts_as_the_step_down_procedure_does() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_only_metrics_with_a_better_and_a_worse_are_adjusted_for_their_number() -> None:
    length = Metric("length", "just a number", "test", direction="none", maximum=float("inf"))
    candidate, baseline = np.zeros(50), np.zeros(50)
    candidate[:9], baseline[9:12] = 1, 1
    tables = [table_of(BINARY, values) for values in (candidate, baseline)]
    one, other = (
        replace(
            table,
            metrics=(BINARY, length),
            values={**table.values, "length": table.values["binary"]},
            statistics={**table.statistics, "length": table.statistics["binary"]},
        )
        for table in tables
    )
    directed, described = compare_tables(one, other, settings()).metrics
    assert directed.p_value_holm == directed.p_value
    assert described.p_value_holm is None and described.p_value is not None


def test_the_minimum_detectable_effect_is_found_about_80_percent_of_the_time() -> None:
    random = np.random.default_rng(14)
    base = random.random((300, 150))
    first = base[0]
    noise = random.normal(0, 0.1, (300, 150))
    found = compare(SHARE, first + noise[0], first)
    effect = found.minimum_detectable_effect
    assert effect is not None
    decided = sum(
        compare(SHARE, base[i] + effect + noise[i], base[i], resamples=400).better == "candidate"
        for i in range(1, 300)
    )
    assert 0.7 <= decided / 299 <= 0.9


def test_mcnemar_with_no_changed_row_says_nothing() -> None:
    assert stats.mcnemar_p_value(0, 0) == 1.0


def test_a_clustered_binary_metric_is_not_given_mcnemars_test() -> None:
    random = np.random.default_rng(15)
    questions = np.repeat(np.arange(20.0), 3)
    candidate = table_of(BINARY, (random.random(60) < 0.6).astype(float), questions)
    baseline = table_of(BINARY, (random.random(60) < 0.4).astype(float), questions)
    found = compare_tables(candidate, baseline, settings()).metrics[0]
    assert found.p_value_method == "paired randomisation"
    assert (found.rows, found.clusters) == (60, 20)


def test_the_same_inputs_give_exactly_the_same_figures() -> None:
    values = np.random.default_rng(16).random(300)
    tables = [table_of(SHARE, values) for _ in range(2)]
    assert summarize_metrics(tables[0], settings()) == summarize_metrics(tables[1], settings())
    assert MEAN.figure(np.array([3.0, 4.0])) == 0.75


def test_10_000_resamples_over_10_000_rows_take_seconds() -> None:
    random = np.random.default_rng(17)
    baseline = table_of(SHARE, random.random(10_000))
    candidate = table_of(SHARE, random.random(10_000))
    start = time.process_time()
    compare_tables(candidate, baseline, settings(10_000))
    assert time.process_time() - start < 30
