"""Evaluation sees answers only: files whose answers hold thoughts, rows that were cut in them, and the verdict."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import load_config
from tasks.core.evaluation.answers import read_answers
from tasks.core.evaluation.evaluate import evaluation_files
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.report.writing import compare_runs
from tasks.evaluator import Evaluator
from tests.making.evaluation_runs import evaluate_run, row, training, write_run

ROWS = 100


def answers_file(path: Path, answers: list[Any], **columns: Any) -> Path:
    """A file of answers from elsewhere; `answers` are texts, or rows in part."""
    lines = []
    for i, answer in enumerate(answers):
        own = answer if isinstance(answer, dict) else {"predicted_answer": answer}
        lines.append(
            {"id": f"r{i}", "question": f"What is {i} + {i}?", "ground_truth": str(2 * i), **columns, **own}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def settings(tmp_path: Path, *metrics: str, **more: Any) -> Any:
    return load_config(
        None,
        {
            "evaluator.metrics": list(metrics or ("exact_match", "numeric_match")),
            "evaluator.bootstrap_resamples": 200,
            "pipeline.runs_dir": str(tmp_path / "runs"),
            **{f"evaluator.{name}": value for name, value in more.items()},
        },
    ).evaluator


def scored(path: Path, tmp_path: Path, *metrics: str, **more: Any) -> EvaluationSummary:
    return evaluate_run(path, None, settings(tmp_path, *metrics, **more))


def value(summary: EvaluationSummary, metric: str) -> float | None:
    found = summary.candidate.metric(metric)
    assert found is not None
    return found.value


FORMS = {
    "a block": "<think>\nI add {i} and {i}, not 7.\n</think>\n\n{answer}",
    "the closing marker only": "I add {i} and {i}, not 7.\n</think>\n\n{answer}",
    "brackets": "[THINK]not 7[/THINK]{answer}",
    "an empty block": "<think>\n\n</think>\n\n{answer}",
    "channels": "<|channel|>analysis<|message|>not 7<|end|>"
    "<|start|>assistant<|channel|>final<|message|>{answer}<|return|>",
    "channels without their tokens": "analysisWe add, not 7.assistantfinal{answer}",
    "no thoughts": "{answer}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["predicted_answer", "assistant_response"])
def test_thoughts_in_a_file_from_elsewhere_are_no_part_of_the_scored_answer(
    form: str, column: str, tmp_path: Path
) -> None:
    answers: list[Any] = [{column: FORMS[form].format(i=i, answer=2 * i)} for i in range(20)]
    if column == "assistant_response":
        for i, own in enumerate(answers):
            own["user_prompt"] = f"What is {i} + {i}?"
    summary = scored(answers_file(tmp_path / "answers.jsonl", answers), tmp_path)
    assert value(summary, "exact_match") == 1.0
    assert summary.candidate.cut_in_thoughts_rows == 0


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_thoughts_in_a_column_of_their_own_are_shown_and_not_scored(name: str, tmp_path: Path) -> None:
    answers = [{"predicted_answer": "0", name: "I add."}, {"predicted_answer": None, name: "I add and"}]
    first, second = read_answers(answers_file(tmp_path / "answers.jsonl", answers))
    assert (first.predicted_answer, first.reasoning, first.metadata.is_cut_in_thoughts) == (
        "0",
        "I add.",
        False,
    )
    assert (second.predicted_answer, second.reasoning, second.metadata.is_cut_in_thoughts) == (
        "",
        "I add and",
        True,
    )


def test_an_answer_that_quotes_markers_is_scored_whole(tmp_path: Path) -> None:
    answers = [
        {"predicted_answer": text, "ground_truth": text}
        for text in ("Use `</think>`.", "a <think>b</think> c")
    ]
    path = answers_file(tmp_path / "answers.jsonl", answers)
    assert [answer.reasoning for answer in read_answers(path)] == [None, None]
    assert value(scored(path, tmp_path), "exact_match") == 1.0


def test_a_reference_with_thoughts_is_compared_by_its_answer(tmp_path: Path) -> None:
    answers = [{"predicted_answer": "<think>a</think>4", "ground_truth": "<think>\nb\n</think>\n\n4"}]
    assert value(scored(answers_file(tmp_path / "a.jsonl", answers), tmp_path), "exact_match") == 1.0


def test_every_right_answer_is_read_without_its_thoughts(tmp_path: Path) -> None:
    references = ["<think>b</think>four", "<think>c</think>4"]
    answers = [{"predicted_answer": "<think>a</think>4", "ground_truth": references}]
    assert value(scored(answers_file(tmp_path / "a.jsonl", answers), tmp_path), "exact_match") == 1.0


def test_references_are_read_by_the_markers_that_the_answers_were_split_by(tmp_path: Path) -> None:
    own = {"generation_config": {"thought_markers": ["<plan>", "</plan>"]}, "is_cut_in_thoughts": False}
    off: dict[str, object] = {"generation_config": {"thought_markers": []}}
    answers = [
        {"predicted_answer": "4", "ground_truth": "<plan>b</plan>4", "metadata": own},
        {"predicted_answer": "<think>a</think>4", "ground_truth": "<think>a</think>4", "metadata": off},
    ]
    assert value(scored(answers_file(tmp_path / "a.jsonl", answers), tmp_path), "exact_match") == 1.0


def test_report_and_spreadsheet_show_thoughts_apart_from_the_answer(tmp_path: Path) -> None:
    import openpyxl

    answers = ["<think>I add.</think>0", "<think>I add and"]
    path = answers_file(tmp_path / "answers.jsonl", answers)
    scored(path, tmp_path)
    files = evaluation_files(path)
    html = files.report_path.read_text(encoding="utf-8")
    found = re.search(r'id="packed-rows"[^>]*>([^<]*)<', html)
    assert found is not None
    rows = json.loads(gzip.decompress(base64.b64decode(found[1])))
    assert [(row["c"]["t"], row["c"]["h"], row["c"]["lost"]) for row in rows] == [
        ("0", "I add.", False),
        ("", "I add and", True),
    ]
    header, *lines = openpyxl.load_workbook(files.spreadsheet_path)["rows"].iter_rows(values_only=True)
    named = [dict(zip(header, line, strict=False)) for line in lines]
    assert [row["candidate thoughts"] for row in named] == ["I add.", "I add and"]
    assert [row["candidate cut in thoughts"] for row in named] == [False, True]


def test_thoughts_stay_in_answers_when_the_setting_says_so(tmp_path: Path) -> None:
    path = answers_file(tmp_path / "answers.jsonl", ["<think>a</think>0"])
    assert value(scored(path, tmp_path, thought_markers="none"), "exact_match") == 0.0
    (kept,) = read_answers(path, ())
    assert kept.predicted_answer == "<think>a</think>0"


def test_own_markers_split_a_file_with_a_format_of_its_own(tmp_path: Path) -> None:
    path = answers_file(tmp_path / "answers.jsonl", ["<<PLAN>> add <<SAY>> 0"])
    assert value(scored(path, tmp_path), "exact_match") == 0.0
    summary = scored(path, tmp_path, thought_markers=["<<PLAN>>", "<<SAY>>"])
    assert value(summary, "exact_match") == 1.0


def test_rows_without_any_marker_are_cut_where_the_opening_one_stood_in_the_prompt(tmp_path: Path) -> None:
    answers = [f"I add.\n</think>\n\n{2 * i}" if i % 4 else f"I add {2 * i} and" for i in range(20)]
    summary = scored(answers_file(tmp_path / "answers.jsonl", answers), tmp_path)
    assert summary.candidate.cut_in_thoughts_rows == 5
    assert value(summary, "exact_match") == 0.75


def test_one_row_that_ends_thoughts_does_not_make_the_others_cut(tmp_path: Path) -> None:
    answers = [f"{2 * i}" for i in range(19)] + ["so\n</think>\n\n38"]
    summary = scored(answers_file(tmp_path / "answers.jsonl", answers), tmp_path)
    assert summary.candidate.cut_in_thoughts_rows == 0
    assert value(summary, "exact_match") == 1.0


@pytest.mark.parametrize(
    "metric", ["exact_match", "numeric_match", "contains", "f1", "chrf", "regex_match:[0-9]"]
)
def test_a_row_cut_in_its_thoughts_counts_as_empty_whatever_they_say(metric: str, tmp_path: Path) -> None:
    answers = [f"<think>{i} + {i} is {2 * i}" for i in range(20)]
    summary = scored(answers_file(tmp_path / "answers.jsonl", answers), tmp_path, metric)
    assert value(summary, metric) == 0.0


def test_cut_rows_are_counted_told_first_and_measured(tmp_path: Path) -> None:
    answers = [f"<think>{2 * i}" if i < 5 else f"<think>a</think>{2 * i}" for i in range(20)]
    summary = scored(
        answers_file(tmp_path / "answers.jsonl", answers),
        *(tmp_path, "exact_match", "cut_in_thoughts_rate", "empty_rate", "refusal_rate", "truncation_rate"),
    )
    assert summary.notes[0].startswith("5 of 20 answers of the candidate (25.0 %) were cut in their thoughts")
    rates = {
        name: value(summary, f"{name}_rate") for name in ("cut_in_thoughts", "empty", "refusal", "truncation")
    }
    assert rates == {"cut_in_thoughts": 0.25, "empty": 0.25, "refusal": 0.0, "truncation": None}
    report = evaluation_files(tmp_path / "answers.jsonl").report_path.read_text(encoding="utf-8")
    assert "Answers cut in their thoughts" in report


def test_token_length_is_that_of_the_answer(tmp_path: Path) -> None:
    counted = {"predicted_answer": "4", "reasoning": "a b", "metadata": {"token_count": 9, "reasoning_tokens": 7,
                                                                         "is_cut_in_thoughts": False}}  # fmt: skip
    uncounted = {"predicted_answer": "<think>a b</think>4", "metadata": {"token_count": 9}}
    path = answers_file(tmp_path / "answers.jsonl", [counted, uncounted])
    found = scored(path, tmp_path, "token_length").candidate.metric("answer_tokens")
    assert found is not None
    assert (found.value, found.scored_rows) == (2.0, 1)
    assert "the tokens of its thoughts were not counted" in found.unscored_reasons


def test_a_run_that_was_split_when_it_was_made_is_not_split_again(tmp_path: Path) -> None:
    own = {
        "predicted_answer": "<think> opens thoughts, </think> closes them",
        "metadata": {"is_cut_in_thoughts": False, "reasoning_tokens": 3},
    }
    off = {
        "predicted_answer": "<think>a</think>4",
        "metadata": {"generation_config": {"thought_markers": []}},
    }
    rows = list(read_answers(answers_file(tmp_path / "answers.jsonl", [own, off])))
    assert [found.predicted_answer for found in rows] == [own["predicted_answer"], off["predicted_answer"]]


def test_error_rows_keep_their_error(tmp_path: Path) -> None:
    answers = [{"predicted_answer": "<think>a", "error": "out of memory"}]
    (found,) = read_answers(answers_file(tmp_path / "answers.jsonl", answers))
    assert found.error == "out of memory"
    assert not found.metadata.is_cut_in_thoughts


# --- the verdict


def verdict(tmp_path: Path, candidate: list[str], champion: list[str], metric: str) -> Any:
    """The gate's verdict about two runs whose answers still hold their thoughts."""
    for name, texts, adapter in (("base", champion, None), ("tuned", candidate, "f" * 64)):
        rows = [row(i, text, str(2 * i + 1)) for i, text in enumerate(texts)]
        lines = [prediction.model_dump(mode="json") for prediction in rows]
        for line in lines:  # as earlier versions wrote them
            del (
                line["reasoning"],
                line["metadata"]["is_cut_in_thoughts"],
                line["metadata"]["reasoning_tokens"],
            )
        write_run(tmp_path / "runs" / name, rows, adapter=adapter, lines=lines)
    training(tmp_path / "models" / "tuned")
    config = load_config(
        None,
        {
            "evaluator.run_name": "tuned",
            "evaluator.baseline": "base",
            "evaluator.metrics": [metric],
            "evaluator.bootstrap_resamples": 200,
            "pipeline.runs_dir": str(tmp_path / "runs"),
            "pipeline.models_dir": str(tmp_path / "models"),
        },
    )
    found = Evaluator(config).run().verdict
    assert found is not None
    return found


@pytest.mark.parametrize("metric", ["exact_match", "numeric_match"])
def test_a_candidate_without_thoughts_that_is_worse_than_a_thinking_champion_is_rejected(
    tmp_path: Path, metric: str
) -> None:
    plain = [str(2 * i + 1) if i < 28 else "5000" for i in range(ROWS)]
    thinking = [
        f"<think>\nI add {i} and {i}, maybe {3 * i + 4000}.\n</think>\n\n{2 * i + 1 if i < 90 else 7000}"
        for i in range(ROWS)
    ]
    found = verdict(tmp_path, plain, thinking, metric)
    assert found.decision == "reject", found


@pytest.mark.parametrize("opening", ["<think>\n", "<|channel|>analysis<|message|>"])
def test_a_candidate_that_is_always_cut_in_its_thoughts_is_rejected(tmp_path: Path, opening: str) -> None:
    cut = [f"{opening}I need {i} and {i} and one, that is {2 * i + 1}" for i in range(ROWS)]
    champion = [str(2 * i + 1) if i < 60 else "7000" for i in range(ROWS)]
    found = verdict(tmp_path, cut, champion, "numeric_match")
    assert found.decision == "reject", found


def test_a_thinking_candidate_that_is_better_is_promoted_by_its_answers(tmp_path: Path) -> None:
    thinking = [f"<think>\nMaybe 7000.\n</think>\n\n{2 * i + 1}" for i in range(ROWS)]
    champion = [str(2 * i + 1) if i < 60 else "7000" for i in range(ROWS)]
    found = verdict(tmp_path, thinking, champion, "numeric_match")
    assert found.decision == "promote", found


def test_two_files_are_compared_by_their_answers(tmp_path: Path) -> None:
    before = answers_file(tmp_path / "before.jsonl", [str(2 * i) for i in range(20)])
    after = answers_file(tmp_path / "after.jsonl", [f"<think>a</think>{2 * i}" for i in range(20)])
    summary, _ = compare_runs(before, after, settings(tmp_path))
    assert summary.comparison is not None
    compared = summary.comparison.metric("exact_match")
    assert compared is not None
    assert (compared.candidate, compared.baseline) == (1.0, 1.0)
