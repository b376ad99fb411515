"""The gate: which figures promote, reject or leave open; how often it errs; what it says."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tasks.core.config import GateConfig, load_config
from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.comparison import compare_tables
from tasks.core.evaluation.contamination import training_overlap
from tasks.core.evaluation.gate.case import GateInputs, NoiseFloor
from tasks.core.evaluation.gate.gate import decide, primary_of
from tasks.core.evaluation.summary import EvaluationSummary, OverlapSummary, Verdict
from tasks.core.metrics.catalogue import reported, resolve
from tasks.core.metrics.metric import FloatArray, Metric
from tasks.core.models.trained.registry import write_manifest
from tasks.core.records import Prediction
from tasks.evaluator import Evaluator
from tests.making.evaluation_runs import row, sums, training, write_run

ROOT = Path(__file__).resolve().parents[2]
PRIMARY = Metric("exact_match", "0 or 1", "test", kind="binary")
GUARD = Metric("f1", "between 0 and 1", "test")
JSON = Metric("json_valid", "0 or 1", "test", kind="binary")
RATE = Metric("empty_rate", "lower is better", "test", kind="binary", direction="lower")


def load_simulation() -> ModuleType:
    """bench/gate.py as a module: the test is its short version."""
    specification = importlib.util.spec_from_file_location("bench_gate", ROOT / "bench" / "gate.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


simulation = load_simulation()


def shares(*counts: tuple[int, float]) -> FloatArray:
    """Scores: so many rows of each value."""
    return np.concatenate([np.full(count, value) for count, value in counts])


def verdict(
    candidate: dict[Metric, FloatArray],
    opponent: dict[Metric, FloatArray],
    gate: GateConfig | None = None,
    **changes: Any,
) -> Verdict:
    """The verdict about two runs whose origin is in order, unless `changes` say otherwise."""
    evaluation = simulation.settings(1000)
    tables = (simulation.table_of(candidate), simulation.table_of(opponent))
    runs = [
        simulation.run_of(name, table, evaluation)
        for name, table in zip(("tuned", "base"), tables, strict=True)
    ]
    errors = changes.pop("error_rows", (0, 0))
    runs = [run.model_copy(update={"error_rows": count}) for run, count in zip(runs, errors, strict=True)]
    inputs = GateInputs(
        candidate=runs[0],
        opponent=runs[1],
        comparison=compare_tables(*tables, evaluation),
        **{
            "against": "champion",
            "confidence": 0.95,
            "noise": NoiseFloor(0.0, reason="float32"),
            "overlap": OverlapSummary(
                training_data_id="train.jsonl",
                train_rows=300,
                test_rows=100,
                exact_test_rows=0,
                near_test_rows=0,
                share=0.0,
            ),
            "same_template": True,
            **changes,
        },
    )
    return decide(inputs, tables[0].metrics[0], gate or GateConfig(guard_metrics="others"))


BETTER, WORSE, EQUAL = shares((80, 1), (20, 0)), shares((30, 1), (70, 0)), shares((50, 1), (50, 0))


def outcome(found: Verdict, name: str) -> str:
    (check,) = (check for check in found.checks if name in check.name)
    return check.outcome


def test_a_candidate_that_is_clearly_better_is_promoted_and_told_with_figures() -> None:
    found = verdict({PRIMARY: BETTER}, {PRIMARY: EQUAL})
    assert (found.decision, found.primary_metric, found.against) == ("promote", "exact_match", "champion")
    assert found.reasons[0].startswith(
        "The candidate is better than the champion: Exact match 80.0 against 50.0, +30.0 points (95 % interval"
    )
    assert "p < 0.001" in found.reasons[0]


def test_a_candidate_that_is_clearly_worse_is_rejected() -> None:
    found = verdict({PRIMARY: WORSE}, {PRIMARY: EQUAL})
    assert found.decision == "reject"
    assert found.reasons[0].startswith("The candidate is worse than the champion")


def test_the_same_scores_are_inconclusive() -> None:
    found = verdict({PRIMARY: EQUAL}, {PRIMARY: EQUAL})
    assert found.decision == "inconclusive"
    assert found.reasons[0].startswith("No difference from the champion can be shown")


def test_a_small_difference_is_inconclusive_and_says_how_many_rows_would_show_it() -> None:
    found = verdict({PRIMARY: shares((56, 1), (44, 0))}, {PRIMARY: np.roll(EQUAL, 25)})
    assert found.decision == "inconclusive"
    assert "rows are needed" in found.reasons[0]


def test_one_check_that_is_open_keeps_a_better_candidate_from_promotion() -> None:
    few = verdict({PRIMARY: BETTER[:90]}, {PRIMARY: EQUAL[:90]}, GateConfig(minimum_rows=91))
    assert few.decision == "inconclusive"
    assert few.reasons == ("90 different questions are scored in both runs; at least 91 are asked for.",)


def test_a_guard_that_surely_falls_rejects_a_candidate_that_is_better_otherwise() -> None:
    falls = {PRIMARY: BETTER, GUARD: np.full(100, 0.4) + np.arange(100) / 1000}
    found = verdict(falls, {PRIMARY: EQUAL, GUARD: np.full(100, 0.6)})
    assert found.decision == "reject"
    assert "falls by more than the allowed 3.0 points" in found.reasons[0]
    assert outcome(found, "Exact match is the primary metric") == "passed"


@pytest.mark.parametrize(
    ("guard", "before", "after"),
    [(GUARD, 0.9, 0.2), (JSON, 1.0, 0.0), (RATE, 0.0, 1.0)],
    ids=["continuous", "higher is better", "lower is better"],
)
def test_a_guard_that_falls_alike_on_every_row_rejects(guard: Metric, before: float, after: float) -> None:
    found = verdict(
        {PRIMARY: BETTER, guard: np.full(100, after)}, {PRIMARY: EQUAL, guard: np.full(100, before)}
    )
    assert found.decision == "reject"
    assert "by more than the allowed 3.0 points" in found.reasons[0]


def test_a_fall_that_is_alike_on_few_rows_or_hardly_beyond_the_margin_leaves_it_open() -> None:
    few = GateConfig(minimum_rows=5, non_inferiority_margin=0.1, guard_metrics="others")
    scores = {PRIMARY: np.ones(8)}, {PRIMARY: np.zeros(8)}
    found = verdict(scores[0] | {GUARD: np.full(8, 0.5)}, scores[1] | {GUARD: np.full(8, 0.7)}, few)
    assert found.decision == "inconclusive"
    barely = {PRIMARY: BETTER, GUARD: np.full(100, 0.465)}
    found = verdict(barely, {PRIMARY: EQUAL, GUARD: np.full(100, 0.5)})
    assert outcome(found, "F1 does not fall") == "undecided"


def test_a_guard_that_may_have_fallen_leaves_it_open() -> None:
    random = np.random.default_rng(1)
    noisy = {PRIMARY: BETTER, GUARD: np.clip(0.48 + random.normal(0, 0.3, 100), 0, 1)}
    found = verdict(noisy, {PRIMARY: EQUAL, GUARD: np.full(100, 0.5)})
    assert found.decision == "inconclusive"
    assert outcome(found, "F1 does not fall") == "undecided"


def test_a_guard_within_its_margin_and_one_of_which_no_row_is_worse_pass() -> None:
    near = {PRIMARY: BETTER, GUARD: np.full(100, 0.5) - np.arange(100) / 10_000, RATE: np.zeros(100)}
    found = verdict(near, {PRIMARY: EQUAL, GUARD: np.full(100, 0.5), RATE: np.zeros(100)})
    assert found.decision == "promote"
    assert outcome(found, "F1 does not fall") == outcome(found, "Empty rate does not fall") == "passed"


def test_where_lower_is_better_a_rise_is_the_fall_that_a_guard_watches() -> None:
    found = verdict({PRIMARY: BETTER, RATE: shares((40, 1), (60, 0))}, {PRIMARY: EQUAL, RATE: np.zeros(100)})
    assert found.decision == "reject"


def test_only_named_guards_are_watched_when_some_are_named() -> None:
    scores = {PRIMARY: BETTER, GUARD: np.full(100, 0.1), RATE: np.zeros(100)}
    found = verdict(
        scores,
        {PRIMARY: EQUAL, GUARD: np.full(100, 0.9), RATE: np.zeros(100)},
        GateConfig(guard_metrics=("empty_rate",)),
    )
    assert found.decision == "promote"


def test_too_many_errors_reject_unless_the_opponent_has_them_too() -> None:
    scores = {PRIMARY: BETTER}, {PRIMARY: EQUAL}
    assert verdict(*scores, error_rows=(6, 0)).decision == "reject"
    assert verdict(*scores, error_rows=(5, 0)).decision == "promote"
    both = verdict(*scores, error_rows=(6, 8))
    assert both.decision == "inconclusive"
    assert "look at the data" in both.reasons[0]
    assert verdict(*scores, error_rows=(50, 6)).decision == "reject"


def test_a_candidate_that_is_scored_on_the_rows_it_does_well_is_not_promoted() -> None:
    some = np.where(np.arange(100) < 40, np.nan, 1.0)
    mostly = {PRIMARY: some}, {PRIMARY: EQUAL}
    found = verdict(*mostly)
    assert found.decision == "inconclusive"
    assert "40 rows of the candidate failed or have no score" in found.reasons[0]
    assert any("Exact match is missing for 40 of 100 rows; 5 % are allowed" in told for told in found.reasons)
    assert verdict(*mostly, GateConfig(maximum_unscored_rate=0.4)).decision == "inconclusive"
    unasked = {PRIMARY: np.where(np.arange(100) < 40, np.nan, EQUAL)}
    rest = {PRIMARY: np.where(np.arange(100) < 40, np.nan, BETTER)}
    both = verdict(rest, unasked, GateConfig(maximum_unscored_rate=0.4, minimum_rows=10))
    assert both.decision == "promote", "rows that neither side has decide nothing"


def test_a_guard_may_miss_rows_in_both_runs_but_not_in_one() -> None:
    some = np.where(np.arange(100) < 40, np.nan, 0.5)
    scores = {PRIMARY: BETTER, GUARD: some}, {PRIMARY: EQUAL, GUARD: some}
    assert verdict(*scores, GateConfig(minimum_rows=10, guard_metrics=("f1",))).decision == "promote"
    found = verdict(scores[0], scores[1] | {GUARD: np.full(100, 0.5)})
    assert found.decision == "inconclusive"
    assert any("F1 is missing in one run for 40 of 100 rows" in told for told in found.reasons)


def test_a_difference_no_larger_than_the_noise_is_inconclusive_either_way() -> None:
    noise = NoiseFloor(0.3125, rows=16, changed=5)
    for candidate, decision in ((BETTER, "inconclusive"), (WORSE, "inconclusive")):
        found = verdict({PRIMARY: candidate}, {PRIMARY: EQUAL}, noise=noise)
        assert (found.decision, found.noise_floor) == (decision, 0.3125)
        assert any("5 of 16 rows score differently" in reason for reason in found.reasons)
    assert verdict({PRIMARY: BETTER}, {PRIMARY: EQUAL}, noise=NoiseFloor(0.1, 10, 1)).decision == "promote"


def test_noise_that_was_not_measured_is_told_and_stops_nothing() -> None:
    found = verdict({PRIMARY: BETTER}, {PRIMARY: EQUAL}, noise=NoiseFloor(None, reason="noise_rows = 0"))
    assert found.decision == "promote"
    assert outcome(found, "above the noise") == "skipped"


def test_a_gain_below_the_smallest_that_is_wanted_is_inconclusive() -> None:
    found = verdict({PRIMARY: BETTER}, {PRIMARY: EQUAL}, GateConfig(minimum_effect=0.4))
    assert found.decision == "inconclusive"
    assert "less than 40.0 points is not worth a promotion" in found.reasons[0]


def test_training_on_test_questions_another_template_or_a_missing_champion_stop_a_promotion() -> None:
    seen = OverlapSummary(
        training_data_id="train.jsonl",
        train_rows=300,
        test_rows=100,
        exact_test_rows=2,
        near_test_rows=1,
        share=0.03,
        questions=("What is 1 + 1?",),
    )
    scores = {PRIMARY: BETTER}, {PRIMARY: EQUAL}
    overlapping = verdict(*scores, overlap=seen)
    assert overlapping.decision == "inconclusive"
    assert "3 of 100 test questions are in the training data (2 exactly, 1 nearly" in overlapping.reasons[0]
    assert verdict(*scores, GateConfig(maximum_overlap=0.03), overlap=seen).decision == "promote"
    assert verdict(*scores, same_template=False).decision == "inconclusive"
    assert verdict(*scores, missing_champion="The champion is gone").decision == "inconclusive"


def test_the_primary_metric_is_the_first_with_a_direction_or_the_named_one() -> None:
    metrics = reported(resolve(["length", "f1", "rouge_score"]))
    assert primary_of(metrics, GateConfig()).name == "f1"  # type: ignore[union-attr]
    assert primary_of(metrics, GateConfig(primary_metric="rouge2")).name == "rouge2"  # type: ignore[union-attr]
    assert primary_of(reported(resolve(["length"])), GateConfig()) is None


def test_a_metric_that_is_not_computed_or_has_no_direction_cannot_gate() -> None:
    metrics = reported(resolve(["length", "f1"]))
    with pytest.raises(EvaluationError, match=r"'exact_match', which is not computed .*answer_words"):
        primary_of(metrics, GateConfig(primary_metric="exact_match"))
    with pytest.raises(EvaluationError, match="answer_words, which has no better and worse"):
        primary_of(metrics, GateConfig(guard_metrics=("answer_words",)))


# --- how often it errs; bench/gate.py is the long version

SIMULATIONS = 250


@pytest.mark.parametrize("kind", list(simulation.KINDS))
def test_two_equal_models_are_promoted_at_most_5_percent_of_the_time(kind: str) -> None:
    found = simulation.decisions(simulation.KINDS[kind], 100, 0.0, SIMULATIONS)
    # The promise is 5 %; the gate's level is 2.5 % on this side. Up to 5 % covers 2.5 standard errors of that.
    assert found["promote"] <= 0.05
    assert found["inconclusive"] >= 0.9


def test_the_gate_finds_a_better_model_as_often_as_mcnemars_test() -> None:
    gate, mcnemar = simulation.power_beside_mcnemar(200, 0.15, 60)
    assert gate >= mcnemar > 0.7


def test_the_guards_that_are_watched_by_default_hardly_keep_a_better_model_back() -> None:
    gate, mcnemar = simulation.power_beside_mcnemar(200, 0.2, 60, simulation.watched_runs)
    assert gate >= 0.9 * mcnemar > 0.7


# --- from files to a verdict


def evaluated(tmp_path: Path, **settings: Any) -> EvaluationSummary:
    chosen = {
        "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"),
        "evaluator.metrics": ["exact_match", "f1"],
        "evaluator.bootstrap_resamples": 500,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return Evaluator(load_config(overrides=chosen, environ={}), run="tuned").score()


def promote_by_hand(tmp_path: Path, run_name: str) -> None:
    (tmp_path / "models" / "promoted.json").write_text(json.dumps({"run_name": run_name}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A candidate that answers 70 of 100, its base with 20."""
    training(tmp_path / "models" / "tuned")
    write_run(
        tmp_path / "runs" / "tuned", sums(100, 70), model_id=str(tmp_path / "models/tuned"), adapter="b" * 64
    )
    write_run(tmp_path / "runs" / "base", sums(100, 20))
    return tmp_path


def add_champion(root: Path, right: int) -> None:
    """A promoted model with a run of its own over the same rows."""
    from tasks.core.models.digests import weights_sha256

    directory = root / "models" / "champion"
    write_manifest(directory, training(directory))
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    write_run(
        root / "runs" / "champion",
        sums(100, right),
        model_id=str(directory),
        adapter=weights_sha256(directory),
    )
    promote_by_hand(root, "champion")


def test_without_a_champion_the_base_model_is_the_one_to_beat(runs: Path) -> None:
    summary = evaluated(runs)
    assert summary.verdict is not None
    assert (summary.verdict.decision, summary.verdict.against) == ("promote", "base")
    assert summary.verdict.against_run == "base"
    assert summary.verdict.settings["minimum_rows"] == 50


@pytest.mark.parametrize(
    ("right", "decision"), [(40, "promote"), (70, "inconclusive"), (95, "reject")], ids=str
)
def test_the_champion_decides_and_the_base_is_shown(runs: Path, right: int, decision: str) -> None:
    add_champion(runs, right)
    summary = evaluated(runs)
    assert summary.verdict is not None and summary.champion is not None and summary.baseline is not None
    assert (summary.verdict.decision, summary.verdict.against) == (decision, "champion")
    assert (summary.baseline.run_name, summary.champion.run_name) == ("base", "champion")
    assert summary.champion_comparison is not None


def test_a_challenge_of_the_champion_is_counted_told_and_held_to_its_part_of_the_error(runs: Path) -> None:
    add_champion(runs, 58)
    first = evaluated(runs).verdict
    assert first is not None and first.challenge is not None
    assert (first.decision, first.challenge.number) == ("promote", 1)
    assert "This is challenge 1 of the champion on these rows: p must be at most 0.0033." in first.reasons[0]
    assert "On fresh rows expect about +" in first.reasons[0]
    again = evaluated(runs).verdict
    assert again is not None and again.challenge is not None and again.challenge.number == 1
    training(runs / "models" / "second")
    write_run(runs / "runs/second", sums(100, 64), model_id=str(runs / "models/second"), adapter="f" * 64)
    config = load_config(
        overrides={
            "pipeline.runs_dir": str(runs / "runs"),
            "pipeline.models_dir": str(runs / "models"),
            "evaluator.metrics": ["exact_match"],
        },
        environ={},
    )
    second = Evaluator(config, run="second").score()
    assert second.verdict is not None and second.verdict.challenge is not None
    assert (second.verdict.decision, second.verdict.challenge.number) == ("inconclusive", 2)
    assert "is not sure enough after so many challenges" in second.verdict.reasons[0]
    (champion,) = second.champions
    assert (champion.run_name, champion.score and champion.score.value) == ("champion", 0.58)


def test_a_champion_that_did_not_answer_these_rows_keeps_the_verdict_open(runs: Path) -> None:
    training(runs / "models" / "champion")
    promote_by_hand(runs, "champion")
    summary = evaluated(runs)
    assert summary.verdict is not None
    assert summary.verdict.decision == "inconclusive"
    assert "The champion champion has no run over these rows" in summary.verdict.reasons[0]
    assert "infer --inferencer.model promoted" in summary.verdict.reasons[0]


def test_the_champion_may_take_the_place_of_the_baseline(runs: Path) -> None:
    add_champion(runs, 40)
    summary = evaluated(runs, evaluator__baseline="champion")
    assert summary.baseline is not None and summary.baseline.run_name == "champion"
    assert summary.champion is None
    assert summary.verdict is not None and summary.verdict.against == "champion"


def test_without_a_champion_it_stands_for_the_base_model(runs: Path) -> None:
    summary = evaluated(runs, evaluator__baseline="champion")
    assert summary.baseline is not None and summary.baseline.run_name == "base"


def test_where_nothing_is_compared_there_is_no_verdict(runs: Path) -> None:
    add_champion(runs, 40)
    assert evaluated(runs, evaluator__baseline="none").verdict is None


def test_a_corpus_figure_that_surely_falls_rejects_though_no_row_is_worse(tmp_path: Path) -> None:
    def reference(i: int) -> str:
        return f"the quick brown fox number {i} jumps over the lazy dog"

    junk = " ".join(["zzz yyy xxx www"] * 60)
    training(tmp_path / "models" / "tuned")
    tuned = [row(i, reference(i) if i < 60 else junk, reference(i)) for i in range(100)]
    base = [row(i, reference(i) if i < 40 else "qqq", reference(i)) for i in range(100)]
    write_run(tmp_path / "runs/tuned", tuned, model_id=str(tmp_path / "models/tuned"), adapter="b" * 64)
    write_run(tmp_path / "runs/base", base)
    metrics = {"evaluator__metrics": ["exact_match", "bleu_score"]}
    summary = evaluated(tmp_path, **metrics, gate__guard_metrics="others")
    assert summary.verdict is not None and summary.comparison is not None
    assert summary.comparison.metrics[1].losses == 0
    assert summary.verdict.decision == "reject"
    assert "BLEU falls by more than the allowed" in summary.verdict.reasons[0]


def test_a_run_with_other_settings_is_no_fair_opponent(runs: Path) -> None:
    write_run(runs / "runs" / "warm", sums(100, 10), temperature=0.5)
    summary = evaluated(runs, evaluator__baseline="warm")
    assert summary.verdict is not None
    assert (summary.verdict.decision, summary.verdict.against) == ("inconclusive", "run")
    assert "temperature: 0.5 -> 1.0" in summary.verdict.reasons[0]


def test_test_questions_in_the_training_data_are_found_kept_and_stop_the_promotion(runs: Path) -> None:
    data = runs / "train.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(95, 140)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns: dict[str, str | None] = {"question_column": "question", "ground_truth_column": "answer"}
    columns |= {"system_prompt_column": None, "system_prompt_override_text": None}
    ids = "\n".join(example.id for example in examples(rows, ColumnMapping("question", "answer")))
    manifest = training(runs / "models" / "tuned").model_copy(
        update={
            "training_data_id": str(data),
            "training_row_count": len(rows),
            "training_rows_sha256": hashlib.sha256(ids.encode()).hexdigest(),
            "settings": {**columns, "training_data_split": "train"},
        }
    )
    write_manifest(runs / "models" / "tuned", manifest)
    summary = evaluated(runs)
    assert summary.overlap is not None and summary.verdict is not None
    assert (summary.overlap.exact_test_rows, summary.overlap.train_rows) == (5, 45)
    assert summary.verdict.decision == "inconclusive"
    data.unlink()
    assert evaluated(runs).overlap == summary.overlap


@pytest.mark.parametrize("skipped", [0, 2])
def test_training_data_that_changed_is_told_whatever_was_skipped(tmp_path: Path, skipped: int) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"question": f"What is {i}?", "answer": str(i) if i >= skipped else ""} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [example.id for example in examples(rows, ColumnMapping("question", "answer"))]
    columns: dict[str, str | None] = {"question_column": "question", "ground_truth_column": "answer"}
    columns["training_data_split"] = "train"
    columns |= {"system_prompt_column": None, "system_prompt_override_text": None}
    manifest = training(tmp_path / "model").model_copy(
        update={
            "training_data_id": str(data),
            "training_row_count": 20 - skipped,
            "skipped_row_count": skipped,
            "training_rows_sha256": hashlib.sha256("\n".join(ids[skipped:]).encode()).hexdigest(),
            "training_dataset_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            "settings": columns,
        }
    )
    tested = [Prediction(id="one", question="What is 7?", ground_truth="7")]
    found = training_overlap(manifest, tested, tmp_path / "first")
    assert isinstance(found, OverlapSummary) and found.exact_test_rows == 1
    rows[7]["question"] = "Who is it?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = training_overlap(manifest, tested, tmp_path / "second")
    assert isinstance(changed, str) and "has changed since the training" in changed


def test_conversations_in_the_training_data_are_compared_by_all_turns(tmp_path: Path) -> None:
    def conversation(i: int) -> dict[str, Any]:
        said = f"Tell me about city number {i}", f"It is city {i}.", "And how many people live there today?"
        roles = ("user", "assistant", "user", "assistant")
        turns = [{"role": r, "content": c} for r, c in zip(roles, (*said, str(i)), strict=True)]
        return {"messages": turns}

    data = tmp_path / "train.jsonl"
    trained, tested = ([conversation(i) for i in numbers] for numbers in (range(60), range(55, 95)))
    data.write_text("".join(json.dumps(row) + "\n" for row in trained))
    mapping = ColumnMapping("question", "answer")
    ids = "\n".join(example.id for example in examples(trained, mapping))
    manifest = training(tmp_path / "model").model_copy(
        update={
            "training_data_id": str(data),
            "training_row_count": 60,
            "training_rows_sha256": hashlib.sha256(ids.encode()).hexdigest(),
            "settings": {
                "question_column": "question",
                "ground_truth_column": "answer",
                "system_prompt_column": None,
                "system_prompt_override_text": None,
                "training_data_split": "train",
            },
        }
    )
    rows = [
        Prediction(id=str(i), question=e.question, earlier_turns=e.earlier_turns, ground_truth=e.reference)
        for i, e in enumerate(examples(tested, mapping))
    ]
    found = training_overlap(manifest, rows, tmp_path)
    assert isinstance(found, OverlapSummary)
    assert (found.exact_test_rows, found.test_rows) == (5, 40)


def test_a_repeated_subset_is_the_noise_floor(runs: Path) -> None:
    repeated = [row(i, "?" if i < 2 else str(2 * i), str(2 * i)) for i in range(8)]
    write_run(runs / "runs" / "tuned" / "repeat-8", repeated, model_id="models/tuned", adapter="b" * 64)
    manifest_path = runs / "runs" / "tuned" / "manifest.json"
    manifest_path.write_text(manifest_path.read_text().replace("float32", "bfloat16"))
    summary = evaluated(runs)
    assert summary.verdict is not None
    assert summary.verdict.noise_floor == 0.25
