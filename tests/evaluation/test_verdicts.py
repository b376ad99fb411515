"""Pairs of answer files and what must become of them: luck, gaps and failures of the other side never promote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.config import load_config
from tasks.core.evaluation.summary import Verdict
from tasks.core.records import Prediction
from tasks.evaluator import Evaluator
from tests.making.evaluation_runs import row, training, write_run


def answers(right: Sequence[bool], *, failed: Sequence[int] = (), **fields: Any) -> list[Prediction]:
    """Sums of which some are answered rightly; `failed` rows have an error in place of an answer."""
    return [
        row(i, "", str(2 * i), error="out of memory", **fields)
        if i in failed
        else row(i, str(2 * i) if is_right else "0.5", str(2 * i), **fields)
        for i, is_right in enumerate(right)
    ]


def verdict(
    root: Path, candidate: Sequence[Prediction], opponent: Sequence[Prediction], **settings: Any
) -> Verdict:
    """The verdict about two plain files of answers."""
    paths = []
    for name, rows in (("candidate", candidate), ("opponent", opponent)):
        path = root / f"{name}.jsonl"
        path.write_text("".join(one.model_dump_json() + "\n" for one in rows), encoding="utf-8")
        paths.append(path)
    chosen = {
        "pipeline.runs_dir": str(root / "runs"),
        "pipeline.models_dir": str(root / "models"),
        "evaluator.metrics": ["exact_match"],
        "evaluator.bootstrap_resamples": 500,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    found = Evaluator(load_config(overrides=chosen, environ={}), run=paths[0], baseline=paths[1]).score()
    assert found.verdict is not None
    return found.verdict


def some(count: int, right: int) -> list[bool]:
    """The first `right` of `count` rows."""
    return [i < right for i in range(count)]


def test_rows_on_which_only_the_opponent_failed_are_no_evidence(tmp_path: Path) -> None:
    failed = range(80, 100)
    found = verdict(tmp_path, answers(some(200, 100)), answers(some(200, 100), failed=failed))
    assert found.decision == "inconclusive"
    assert "No difference" in found.reasons[0] and "on 180 rows" in found.reasons[0]
    assert any("20 of the baseline's 200" in reason for reason in found.reasons)


def test_rows_on_which_only_the_candidate_failed_count_against_it(tmp_path: Path) -> None:
    """Nine failures in 200 rows are allowed, but without those nine it would be better by ten rows only."""
    candidate = answers([i < 119 for i in range(200)], failed=range(101, 110))
    found = verdict(tmp_path, candidate, answers(some(200, 109)))
    assert found.decision == "inconclusive"
    assert "9 rows of the candidate failed or have no score where the baseline has one" in found.reasons[0]


def test_a_file_that_lacks_a_third_of_the_rows_is_not_compared_to_a_verdict(tmp_path: Path) -> None:
    everything = answers(some(200, 100))
    found = verdict(tmp_path, [one for one in everything if int(one.id[:4]) < 133], answers(some(200, 70)))
    assert found.decision == "inconclusive"
    assert any("67 are only in the other run" in reason for reason in found.reasons)


@pytest.mark.parametrize("changed", ["question", "ground_truth", "system_prompt", "earlier_turns"])
def test_other_content_under_the_same_ids_is_not_the_same_row(tmp_path: Path, changed: str) -> None:
    other = {
        "question": "Something else entirely",
        "ground_truth": "0.5",
        "system_prompt": "Be brief.",
        "earlier_turns": ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}),
    }
    opponent = [
        Prediction.model_validate(one.model_dump() | {changed: other[changed]})
        for one in answers([False] * 100)
    ]
    found = verdict(tmp_path, answers([True] * 100), opponent)
    assert found.decision == "inconclusive"
    assert any("in both runs" in reason and "100" in reason for reason in found.reasons)


def test_blanks_and_unicode_form_do_not_make_another_question(tmp_path: Path) -> None:
    candidate = answers(some(100, 90))
    opponent = [
        one.model_copy(update={"question": one.question.replace(" ", "\u00a0 ").replace("?", "\uff1f\u200b")})
        for one in answers(some(100, 40))
    ]
    assert verdict(tmp_path, candidate, opponent).decision == "promote"


def test_a_metric_of_ones_own_that_leaves_losses_unscored_does_not_promote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lenient_metric.py").write_text(
        "def scored(row):\n"
        "    answer = row.predicted_answer\n"
        "    return None if answer == 'unsure' else float(answer == row.ground_truth)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    candidate = answers([i < 126 for i in range(200)])
    lost = [one.model_copy(update={"predicted_answer": "unsure"}) for one in candidate[126:136]]
    opponent = answers([20 <= i < 150 for i in range(200)])
    metric = "lenient_metric:scored"
    found = verdict(
        tmp_path,
        [*candidate[:126], *lost, *candidate[136:]],
        opponent,
        evaluator__metrics=[metric],
        gate__primary_metric=metric,
    )
    assert found.decision == "inconclusive"


def test_more_empty_answers_are_told_first_and_keep_a_better_candidate_from_promotion(tmp_path: Path) -> None:
    candidate = [
        one.model_copy(update={"predicted_answer": ""}) if i >= 92 else one
        for i, one in enumerate(answers(some(100, 92)))
    ]
    found = verdict(tmp_path, candidate, answers(some(100, 50)))
    assert found.decision == "inconclusive"
    assert found.reasons == ("8 of 100 answers are empty, and 0 with the baseline.",)
    silent = [one.model_copy(update={"predicted_answer": ""}) for one in answers([False] * 40)]
    worse = verdict(tmp_path, [*silent, *answers([True] * 100)[40:]], answers(some(100, 30)))
    assert worse.decision == "reject"
    assert "40 of 100 answers are empty, and 0 with the baseline: a rise of more than 3 %" in worse.reasons[0]


def test_answers_that_never_stop_are_told_first(tmp_path: Path) -> None:
    cut: dict[str, Any] = {"finish_reason": "length"}
    candidate = [*answers(some(50, 50), **cut), *answers([True] * 100)[50:]]
    found = verdict(tmp_path, candidate, answers(some(100, 40)))
    assert found.decision == "reject"
    assert "50 of 100 answers were cut at the token limit, and 0 with the baseline" in found.reasons[0]


def test_a_metric_that_nobody_guards_is_a_note_when_it_falls(tmp_path: Path) -> None:
    """The words of the reference are repeated within a long answer: found, but the overlap falls."""
    reference = "blue green red"
    candidate = [row(i, f"{reference} {'x ' * 30}", reference) for i in range(100)]
    opponent = [
        row(i, "blue green yellow red" if i < 40 else "blue green yellow", reference) for i in range(100)
    ]
    metrics = {"evaluator__metrics": ["contains", "f1"]}
    found = verdict(tmp_path, candidate, opponent, **metrics)
    assert found.decision == "promote"
    assert [note for note in found.notes if note.startswith("F1 falls, and is no guard")]
    guarded = verdict(tmp_path, candidate, opponent, **metrics, gate__guard_metrics=["f1"])
    assert guarded.decision == "reject"


def test_a_guard_that_cannot_be_decided_says_how_many_rows_it_needs(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    candidate, opponent = answers(some(100, 90)), answers(some(100, 40))

    def sometimes_json(rows: list[Prediction]) -> list[Prediction]:
        return [
            one.model_copy(update={"predicted_answer": "no"}) if random.random() < 0.05 else one
            for one in rows
        ]

    found = verdict(
        tmp_path,
        sometimes_json(candidate),
        sometimes_json(opponent),
        evaluator__metrics=["exact_match", "json_valid"],
        gate__guard_metrics=["json_valid"],
    )
    assert found.decision == "inconclusive"
    (reason,) = found.reasons
    assert "Json valid may have fallen" in reason and "rows show so in 4 of 5 cases" in reason


def test_one_question_in_a_third_of_the_rows_widens_the_interval_and_is_told(tmp_path: Path) -> None:
    def rows(right: list[bool]) -> list[Prediction]:
        return [
            one.model_copy(update={"question": "What is it?"}) if i < 40 else one
            for i, one in enumerate(answers(right))
        ]

    found = verdict(tmp_path, rows(some(120, 100)), rows(some(120, 30)))
    (check,) = (check for check in found.checks if check.name == "Enough rows")
    assert "One question is asked in 40 of 120 rows" in check.detail


def test_other_number_formats_are_other_settings(tmp_path: Path) -> None:
    training(tmp_path / "models" / "tuned")
    tuned = answers(some(100, 90))
    write_run(tmp_path / "runs/tuned", tuned, model_id=str(tmp_path / "models/tuned"), adapter="b" * 64)
    base = write_run(tmp_path / "runs/base", answers(some(100, 40)))
    manifest = base / "manifest.json"
    text = manifest.read_text().replace('"quantization":"none"', '"quantization":"4bit"')
    manifest.write_text(text.replace('"dtype":"float32"', '"dtype":"bfloat16"'))
    settings = {
        "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"),
        "evaluator.metrics": ["exact_match"],
    }
    found = Evaluator(load_config(overrides=settings, environ={}), run="tuned").score().verdict
    assert found is not None and found.decision == "inconclusive"
    assert "quantization: 4bit -> none; dtype: bfloat16 -> float32" in found.reasons[0]


def test_much_longer_answers_are_told(tmp_path: Path) -> None:
    everything = " ".join(map(str, range(0, 200, 2)))
    listing = [one.model_copy(update={"predicted_answer": everything}) for one in answers(some(100, 100))]
    found = verdict(tmp_path, listing, answers(some(100, 60)), evaluator__metrics=["contains"])
    assert any("answers are much longer: 3" in note for note in found.notes)


def test_leaving_out_a_row_does_not_begin_the_count_anew(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    numbers = []
    for night in range(3):
        rows = [one for one in answers(some(100, 50 + night)) if one.id != f"{night:04d}-0"]
        theirs = [one for one in answers(some(100, 50)) if one.id != f"{night:04d}-0"]
        found = verdict(tmp_path, rows, theirs)
        assert found.challenge is not None
        numbers.append(found.challenge.number)
    assert numbers == [1, 2, 3]


def test_an_interval_of_a_heavy_question_stays_within_what_there_can_be(tmp_path: Path) -> None:
    def rows(easy: bool, right: int) -> list[Prediction]:
        shown = answers([easy if i < 100 else i < right for i in range(200)])
        return [
            one.model_copy(update={"question": "easy"}) if i < 100 else one for i, one in enumerate(shown)
        ]

    found = verdict(tmp_path, rows(True, 130), rows(False, 165))
    assert found.decision == "inconclusive"
    assert "interval \N{MINUS SIGN}100.0 to +100.0" in found.reasons[0]
