"""Metrics that find the answer in the text, metrics of behaviour, and metrics of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.outputs import read_scores
from tasks.core.evaluation.scoring import ScoreTable, score_predictions
from tasks.core.metrics.answer_metrics import (
    contains,
    json_match,
    regex_match,
)
from tasks.core.metrics.behaviour_metrics import is_refusal
from tasks.core.metrics.catalogue import resolve
from tasks.core.metrics.numbers import numeric_match
from tasks.core.records import Prediction, PredictionMetadata
from tests.making.evaluation_runs import evaluate_run, row, write_run


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The answer is Paris, of course.", "paris", 1.0),
        ("In New York City", "York City", 1.0),
        ("There are 15 apples", "5", 0.0),
        ("The theory", "ory", 0.0),
        ("который", "кот", 0.0),
        ("答案是北京。", "北京", 1.0),
        ("คำตอบคือกรุงเทพ", "กรุงเทพ", 1.0),
        ("cat catalogue cat's", "catalogue", 1.0),
        ("anything", "the", 0.0),
        ("anything", " ", None),
        ("", "x", 0.0),
    ],
)
def test_contains_finds_whole_words_in_any_script(
    answer: str, reference: str, expected: float | None
) -> None:
    assert contains(answer, reference) == expected


def test_numeric_match_compares_values_and_not_spellings() -> None:
    assert numeric_match("so 18.0 dollars", "#### 18") == 1.0
    assert numeric_match("so $1,000", "#### 1000") == 1.0
    assert numeric_match("so 19", "#### 18") == 0.0
    assert numeric_match("I do not know", "#### 18") == 0.0
    assert numeric_match("18", "eighteen") == 1.0
    assert numeric_match("18", "many") is None
    assert numeric_match("1e999999999", "1e99999999") == 0.0
    assert numeric_match("9" * 5000, "9" * 5000) == 1.0


def test_numeric_match_finds_the_result_of_every_gsm8k_reference(shared_data_dir: Path) -> None:
    lines = (shared_data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    for answer in answers:
        marked = answer.rsplit("#### ", 1)[1].replace(",", "")
        assert numeric_match(marked, answer) == 1.0
        assert numeric_match(f"1{marked}", answer) == 0.0
        assert numeric_match(f"I think that the result is {marked}.", answer) == 1.0


def test_regex_match_searches_the_reference_as_a_pattern() -> None:
    assert regex_match("It was in 1984.", r"\b19\d\d\b") == 1.0
    assert regex_match("It was in 2084.", r"\b19\d\d\b") == 0.0
    for no_pattern in ("(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000):
        assert regex_match("x", no_pattern) is None


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ('{"b": 1.0, "a": [1, null]}', '{"a": [1, null], "b": 1}', 1.0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0.0),
        ("not json", "{}", 0.0),
        ("NaN", "1", 0.0),
        ("{}", "not json", None),
        ("[" * 100_000, "[]", 0.0),
    ],
)
def test_json_match_compares_values(answer: str, reference: str, expected: float | None) -> None:
    assert json_match(answer, reference) == expected


def score(name: str, *rows: Prediction) -> ScoreTable:
    return score_predictions(rows, resolve([name]))


def test_a_number_of_any_length_is_json() -> None:
    number = "9" * 5000
    assert score("json_valid", row(0, f"[{number}]", None)).values["json_valid"].tolist() == [1.0]
    assert json_match(f"[{number}]", f"[{number}]") == 1.0
    assert json_match(f"[{number}]", f"[{number[1:]}]") == 0.0


def test_json_valid_needs_no_reference() -> None:
    table = score("json_valid", row(0, "[1]", None), row(1, "oops", None), row(2, "", None))
    assert table.values["json_valid"].tolist() == [1.0, 0.0, 0.0]


def test_a_pattern_may_be_part_of_the_metrics_name() -> None:
    name = r"regex_match:^\d+$"
    table = score(name, row(0, "42", None), row(1, "x42", None), row(2, "", None, error="no memory"))
    assert table.values[name].tolist() == [1.0, 0.0, 0.0]
    assert score("regex_match:.*", row(0, "", None, error="no memory")).values["regex_match:.*"].tolist() == [
        0.0
    ]


def test_a_pattern_that_takes_exponential_time_is_given_up_and_unscored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.core.metrics.answer_metrics._PATTERN_SECONDS", 0.05)
    evil, answer = r"^(a|aa)+$", "a" * 50 + "!"
    name = f"regex_match:{evil}"
    table = score(name, *(row(i, answer, None) for i in range(50)), row(50, "a", None))
    assert table.reasons[name] == ["the pattern takes too long"] * 51
    assert regex_match(answer, evil) is None


@pytest.mark.parametrize("filling", ["\n" * 20_000, "\n```" * 20_000, " \n" * 20_000])
def test_a_fence_of_any_length_is_read_in_linear_time(filling: str) -> None:
    assert json_match("```json" + filling, "{}") == 0.0
    assert json_match('```json\n{"a": 1}' + "\n" * 20_000 + "```", '{"a": 1}') == 1.0


def test_a_pattern_that_is_none_is_refused_with_its_position() -> None:
    with pytest.raises(EvaluationError, match=r"unterminated .* at position 0"):
        resolve(["regex_match:(x"])
    with pytest.raises(EvaluationError, match="the repetition number is too large"):
        resolve(["regex_match:a{99999999999999999999}"])


def test_an_undecidable_reference_is_unscored_with_its_reason() -> None:
    for name, reference, reason in (
        ("numeric_match", "many", "the reference has no value"),
        ("contains", " ", "the reference has no words"),
        ("regex_match", "(", "the reference is no regular expression, or takes longer than a second"),
        ("json_match", "{", "the reference is not JSON"),
        ("contains", None, "no reference"),
    ):
        assert score(name, row(0, "x", reference)).reasons[name] == [reason]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m unable to answer this question.",
        "As an AI, I do not have feelings.",
        "I cannot provide medical advice.",
        "As a large language model I have no access to it.",
    ],
)
def test_usual_refusals_are_recognised(answer: str) -> None:
    assert is_refusal(answer) == 1.0


@pytest.mark.parametrize(
    "answer", ["Paris", "I can help: 4", "He said he cannot swim.", "I can't count 5 but 6", ""]
)
def test_plain_answers_are_no_refusals(answer: str) -> None:
    assert is_refusal(answer) == 0.0


def test_rates_and_lengths_leave_error_rows_out() -> None:
    rows = [
        row(0, "one two", "x", finish_reason="length"),
        row(1, " ", "x"),
        row(2, "", "x", error="no memory"),
    ]
    families = resolve(["empty_rate", "refusal_rate", "truncation_rate", "length", "token_length"])
    table = score_predictions(rows, families)
    expected = {
        "empty_rate": [0.0, 1.0],
        "refusal_rate": [0.0, 0.0],
        "truncation_rate": [1.0, 0.0],
        "answer_characters": [7.0, 1.0],
        "answer_words": [2.0, 0.0],
        "answer_tokens": [2.0, 0.0],
    }
    for name, values in expected.items():
        assert table.values[name][:2].tolist() == values
        assert np.isnan(table.values[name][2])
        assert table.reasons[name][2] == "error row"


def test_a_run_that_did_not_count_tokens_is_unscored_by_them() -> None:
    plain = Prediction(id="1", question="q", predicted_answer="a", metadata=PredictionMetadata())
    assert score("token_length", plain).reasons["answer_tokens"] == ["the run did not count tokens"]
    assert score("truncation_rate", plain).reasons["truncation_rate"] == [
        "the run does not say how the answer ended"
    ]


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module own_metrics.py in the working directory."""
    (tmp_path / "own_metrics.py").write_text(
        '''
def polite(row):
    """The answer says please."""
    return "please" in row.predicted_answer

def marks(row):
    return None if row.ground_truth is None else len(row.predicted_answer)
marks.maximum, marks.direction = 100, "lower"

def seconds(row):
    return len(row.predicted_answer)
seconds.maximum, seconds.direction = float("inf"), "lower"

def broken(row):
    return 1 / 0

def wrong(row):
    return "yes"

def far(row):
    return 7

def half(row):
    "  "
    return 0.5
half.kind = "binary"

def ten(row):
    return 1
ten.maximum = "ten"

def ten_or_not(row):
    return 10
ten_or_not.kind, ten_or_not.maximum = "binary", 10
''',
        encoding="utf-8",
    )
    (tmp_path / "no_such_name.py").write_text("x = undefined\n")
    (tmp_path / "no_syntax.py").write_text("def x(:\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("own_metrics")
def test_a_function_of_ones_own_is_a_metric() -> None:
    table = score("own_metrics:polite", row(0, "please", None), row(1, "now", None))
    assert table.values["own_metrics:polite"].tolist() == [1.0, 0.0]
    assert table.metrics[0].description == "The answer says please."


def test_where_values_have_no_worst_an_error_row_is_unscored(own_metrics: Path) -> None:
    rows = [row(0, "abc", None), row(1, "", None, error="out of memory")]
    run = write_run(own_metrics / "run", rows)
    summary = evaluate_run(run, None, EvaluatorConfig(metrics=("own_metrics:seconds",)))
    metric = summary.candidate.metrics[0]
    assert (metric.value, metric.unscored_reasons) == (3.0, {"error row": 1})
    scores = list(read_scores(run / "scores.jsonl"))
    assert [found.scores for found in scores] == [{"own_metrics:seconds": 3.0}, {}]


@pytest.mark.usefixtures("own_metrics")
def test_a_function_states_range_and_direction_by_attributes_and_none_is_unscored() -> None:
    name = "own_metrics:marks"
    table = score(name, row(0, "four", "x"), row(1, "x", None), row(2, "", "x", error="no memory"))
    assert table.reasons[name] == [None, "the function gave no value", None]
    assert table.values[name][[0, 2]].tolist() == [4.0, 100.0]
    assert table.metrics[0].direction == "lower"


@pytest.mark.usefixtures("own_metrics")
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("own_metrics:broken", "failed on row '0000-0': ZeroDivisionError"),
        ("own_metrics:wrong", "gave 'yes' for row '0000-0'"),
        ("own_metrics:far", r"gave 7 for row '0000-0', outside of \[0, 1\]"),
        ("own_metrics:missing", "has no function 'missing'"),
        ("own_metrics:half", r"gave 0\.5 for row '0000-0', but its kind is binary"),
        ("own_metrics:ten", "has minimum 0.0 and maximum 'ten'"),
        ("own_metrics:ten_or_not", "is binary with values from 0 to 10"),
        ("no_such_name:x", "fails when it is imported: NameError: name 'undefined' is not defined"),
        ("no_syntax:x", r"fails when it is imported: SyntaxError: .*line 1"),
        ("leaving:x", "fails when it is imported: SystemExit: 3"),
        ("no_such_module:x", "the module 'no_such_module' cannot be imported"),
    ],
)
def test_what_is_wrong_with_a_function_of_ones_own_is_said(name: str, what: str) -> None:
    with pytest.raises(EvaluationError, match=what):
        score(name, row(0, "x", "x"))
