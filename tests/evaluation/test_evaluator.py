"""The Evaluator door: which runs it takes, what it writes, what it says and refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import openpyxl
import pytest

from tasks.core.config import Config, EvaluatorConfig, PipelineConfig, with_overrides
from tasks.core.errors import DataError, EvaluationError, StorageError, TuneproofError
from tasks.core.evaluation.evaluate import score_run
from tasks.core.evaluation.outputs import read_scores, read_summary
from tasks.core.models.digests import weights_sha256
from tasks.core.records import Message
from tasks.core.report.writing import report_run
from tasks.evaluator import Evaluator
from tests.making.evaluation_runs import evaluate_run, row, sums, training, write_run

FILES = {
    "evaluator_output_summary.json",
    "evaluator_output_detailed.xlsx",
    "scores.jsonl",
    "report.html",
}


def config(root: Path, **evaluator: object) -> Config:
    settings: dict[str, object] = {"bootstrap_resamples": 500, **evaluator}
    return Config(
        evaluator=EvaluatorConfig(**settings),
        pipeline=PipelineConfig(runs_dir=str(root / "runs"), models_dir=str(root / "models")),
    )


@pytest.fixture
def tuned_and_base(tmp_path: Path) -> Path:
    """runs/tuned (an adapter, 30 of 40 right), runs/base (5 of 40 right), models/tuned."""
    training(tmp_path / "models" / "tuned")
    write_run(
        tmp_path / "runs" / "tuned",
        sums(40, 30),
        model_id=str(tmp_path / "models" / "tuned"),
        adapter="b" * 64,
        finished_at="2026-01-02T00:00:00+00:00",
    )
    write_run(tmp_path / "runs" / "base", sums(40, 5))
    return tmp_path


def test_run_writes_all_four_files_and_says_that_the_candidate_is_better(tuned_and_base: Path) -> None:
    summary = Evaluator(config(tuned_and_base)).run()
    run_dir = tuned_and_base / "runs" / "tuned"
    assert {path.name for path in run_dir.iterdir()} - {"manifest.json", "inferencer_output.jsonl"} == FILES
    assert summary.answer.startswith(
        "The candidate is better than its baseline. Exact match 75.0 against 12.5"
    )
    assert "+62.5 points (95 % interval" in summary.answer
    assert summary == read_summary(run_dir / "evaluator_output_summary.json")


def test_the_newest_run_is_scored_and_the_base_models_run_is_found_by_its_weights(
    tuned_and_base: Path,
) -> None:
    write_run(tuned_and_base / "runs" / "stranger", sums(40, 40), weights="f" * 64)
    runs = Evaluator(config(tuned_and_base)).find_runs()
    assert runs.candidate_path.name == "tuned"
    assert runs.baseline_path is not None
    assert runs.baseline_path.name == "base"
    assert runs.trained is not None
    assert runs.trained.run_name == "tuned"


def test_the_base_models_run_with_the_same_settings_is_preferred(tuned_and_base: Path) -> None:
    write_run(
        tuned_and_base / "runs" / "base-hot",
        sums(40, 9),
        temperature=1.5,
        finished_at="2026-01-03T00:00:00+00:00",
    )
    runs = Evaluator(config(tuned_and_base), run="tuned").find_runs()
    assert runs.baseline_path is not None
    assert runs.baseline_path.name == "base"


def test_without_a_run_of_the_base_model_the_scores_stand_alone_and_a_note_says_why(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "tuned", sums(20, 10), adapter="b" * 64)
    summary = Evaluator(config(tmp_path)).run()
    assert summary.baseline is None and summary.comparison is None
    assert summary.answer.startswith("Exact match is 50.0. On 20 rows (95 % interval")
    assert "has no run of the base model package:base/model.gguf over the same rows" in summary.notes[0]


def test_baseline_none_compares_nothing(tuned_and_base: Path) -> None:
    summary = Evaluator(config(tuned_and_base, baseline="none"), run="tuned").run()
    assert summary.comparison is None
    assert not summary.notes


def test_a_baseline_may_be_named_by_run_or_path(tuned_and_base: Path) -> None:
    other = write_run(tuned_and_base / "elsewhere", sums(40, 20), weights="f" * 64)
    by_name = Evaluator(config(tuned_and_base), run="tuned", baseline="base").run()
    by_path = Evaluator(config(tuned_and_base)).run("tuned", other)
    assert by_name.baseline is not None and by_path.baseline is not None
    assert (by_name.baseline.run_name, by_path.baseline.run_name) == ("base", "elsewhere")


def test_a_run_that_does_not_exist_is_refused_with_the_nearest_name(tuned_and_base: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no run 'tunde'") as caught:
        Evaluator(config(tuned_and_base), run="tunde").run()
    assert "did you mean tuned?" in str(caught.value)


def test_without_any_run_the_error_says_to_infer_first(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no finished run") as caught:
        Evaluator(config(tmp_path)).run()
    assert "tuneproof infer" in str(caught.value)


def test_a_run_name_cannot_lead_out_of_the_runs_folder(tuned_and_base: Path) -> None:
    with pytest.raises(EvaluationError, match="no run"):
        Evaluator(config(tuned_and_base), run="../nowhere").run()


def test_scoring_again_gives_the_same_bytes_apart_from_the_time(tuned_and_base: Path) -> None:
    run_dir = tuned_and_base / "runs" / "tuned"
    contents = []
    for _ in range(2):
        Evaluator(config(tuned_and_base)).run()
        summary = json.loads((run_dir / "evaluator_output_summary.json").read_text())
        assert summary.pop("evaluated_at") and summary.pop("content_sha256")
        contents.append(((run_dir / "scores.jsonl").read_bytes(), summary))
    assert contents[0] == contents[1]


def test_scores_hold_every_row_in_order_with_values_reasons_and_the_baselines(tmp_path: Path) -> None:
    tuned = [row(0, "0", "0"), row(1, "", "2", error="out of memory"), row(2, "4", None)]
    base = [row(0, "1", "0"), row(2, "4", None)]
    candidate_dir = write_run(tmp_path / "tuned", tuned)
    evaluate_run(
        candidate_dir,
        write_run(tmp_path / "base", base),
        EvaluatorConfig(metrics=("exact_match",), bootstrap_resamples=100),
    )
    lines = [json.loads(line) for line in (candidate_dir / "scores.jsonl").read_text().splitlines()]
    reason = {"exact_match": "no reference"}
    assert lines == [
        {
            "id": "0000-0",
            "scores": {"exact_match": 1.0},
            "unscored": {},
            "baseline_scores": {"exact_match": 0.0},
            "baseline_unscored": {},
        },
        {"id": "0001-0", "scores": {"exact_match": 0.0}, "unscored": {}},
        {
            "id": "0002-0",
            "scores": {},
            "unscored": reason,
            "baseline_scores": {},
            "baseline_unscored": reason,
        },
    ]


def test_the_answer_is_about_the_first_metric_that_has_a_better_and_a_worse(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "tuned", sums(40, 30)), write_run(tmp_path / "base", sums(40, 5))
    summary = evaluate_run(*runs, EvaluatorConfig(metrics=("length", "exact_match")))
    assert summary.answer.startswith("The candidate is better than its baseline. Exact match 75.0 against")
    summary = evaluate_run(*runs, EvaluatorConfig(metrics=("length",)))
    assert summary.answer.startswith(
        "Answer characters: the candidate's figure is lower than its baseline's. Answer characters"
    )


def test_conversations_that_end_alike_are_different_questions(tmp_path: Path) -> None:
    rows = [
        row(i, "yes", "yes", question="Is it?").model_copy(
            update={"earlier_turns": (Message("user", f"There is city {i // 2}."),)}
        )
        for i in range(6)
    ]
    summary = evaluate_run(write_run(tmp_path / "run", rows), None, EvaluatorConfig(metrics=("exact_match",)))
    assert summary.candidate.distinct_questions == 3


def test_the_summary_tells_errors_cut_answers_and_unscored_rows_apart(tmp_path: Path) -> None:
    rows = [
        row(0, "0", "0"),
        row(1, "", "2", error="out of memory"),
        row(2, "4", None),
        row(3, "many words", "6", finish_reason="length"),
    ]
    run_dir = write_run(tmp_path / "run", rows)
    summary = score_run(run_dir, None, EvaluatorConfig(metrics=("exact_match",), bootstrap_resamples=100))
    run, metric = summary.candidate, summary.candidate.metrics[0]
    assert (run.rows, run.error_rows, run.truncated_rows) == (4, 1, 1)
    assert (metric.scored_rows, metric.unscored_rows, metric.errors_counted_as_wrong) == (3, 1, 1)
    assert metric.unscored_reasons == {"no reference": 1}
    assert metric.value == pytest.approx(1 / 3)
    assert any(
        "1 of 4 rows of the candidate have no answer because of an error" in note for note in summary.notes
    )
    assert any("cut at the token limit" in note for note in summary.notes)


def test_the_summary_carries_what_the_manifest_knows(tuned_and_base: Path) -> None:
    summary = Evaluator(config(tuned_and_base)).run()
    run = summary.candidate
    assert run.reference_perplexity == 3.25
    assert run.reference_tokens == 777
    assert run.completion_tokens_per_second == 50.0
    assert summary.training is not None
    assert len(summary.training.losses) == 20


def test_runs_made_with_other_settings_are_compared_with_a_note(tuned_and_base: Path) -> None:
    write_run(tuned_and_base / "runs" / "hot", sums(40, 5), temperature=1.5)
    summary = Evaluator(config(tuned_and_base), run="tuned", baseline="hot").run()
    assert any("temperature: 1.5 -> 1.0" in note for note in summary.notes)


def test_when_other_metrics_disagree_with_the_first_a_note_says_so(tmp_path: Path) -> None:
    base = [row(i, "no idea at all", f"the sum is {2 * i}") for i in range(40)]
    tuned = [row(i, f"the sum is {3 * i + 1}", f"the sum is {2 * i}") for i in range(40)]
    summary = score_run(
        write_run(tmp_path / "tuned", tuned),
        write_run(tmp_path / "base", base),
        EvaluatorConfig(metrics=("exact_match", "f1"), bootstrap_resamples=200),
    )
    assert summary.answer.startswith("No difference from the baseline can be shown.")
    assert "By F1 the candidate is better." in summary.notes


def test_a_file_with_the_originals_columns_is_scored_into_a_folder_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [
        {"system_prompt": None, "user_prompt": f"q{i}", "assistant_response": "yes", "ground_truth": "yes"}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = Evaluator(config(tmp_path), run=path).run()
    assert summary.candidate.metrics[0].value == 1.0
    assert {file.name for file in (tmp_path / "answers.evaluation").iterdir()} == FILES


def test_predictions_changed_after_their_run_are_refused(tuned_and_base: Path) -> None:
    path = tuned_and_base / "runs" / "tuned" / "inferencer_output.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(EvaluationError, match="was changed after its run"):
        Evaluator(config(tuned_and_base), run="tuned").run()


def test_an_unfinished_run_is_refused(tuned_and_base: Path) -> None:
    (tuned_and_base / "runs" / "tuned" / "manifest.json").unlink()
    with pytest.raises(EvaluationError, match="not finished"):
        Evaluator(config(tuned_and_base), run="tuned").run()


def test_a_damaged_line_is_named_and_earlier_results_stay(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"user_prompt": "q", "assistant_response": "a", "ground_truth": "a"}\n')
    Evaluator(config(tmp_path), run=path).run()
    before = (tmp_path / "answers.evaluation" / "scores.jsonl").read_bytes()
    path.write_text('{"user_prompt": "q", "assis\n')
    with pytest.raises(DataError, match="line 1"):
        Evaluator(config(tmp_path), run=path).run()
    assert (tmp_path / "answers.evaluation" / "scores.jsonl").read_bytes() == before


def test_a_disk_without_room_is_a_storage_error_and_the_old_files_stay(tuned_and_base: Path) -> None:
    run_dir = tuned_and_base / "runs" / "tuned"
    Evaluator(config(tuned_and_base)).run()
    before = {name: (run_dir / name).read_bytes() for name in FILES}
    script = (
        "import gc, resource, sys; from pathlib import Path\n"
        "from tasks.core.errors import StorageError\n"
        "from tasks.core.report.writing import report_run\n"
        "for size in map(int, sys.argv[2:]):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))\n"
        "    try: report_run(Path(sys.argv[1]))\n"
        "    except StorageError as error: print(error)\n"
        "    gc.collect()\n"
    )
    # Too small for a part, for the first part of the archive, for its last ones.
    whole = len(before["evaluator_output_detailed.xlsx"])
    sizes = [str(size) for size in (0, 900, 3000, whole // 2, whole - 1500, whole - 1)]
    done = subprocess.run(
        [sys.executable, "-c", script, run_dir, *sizes], capture_output=True, text=True, check=True
    )
    told = done.stdout.splitlines()
    assert len([line for line in told if "evaluator_output_detailed.xlsx cannot be written" in line]) == 6
    assert "free some space" in done.stdout
    assert done.stderr == ""  # zipfile writes once more from its finaliser
    assert {name: (run_dir / name).read_bytes() for name in FILES} == before
    assert not list(run_dir.glob(".*.tmp")) and not list(run_dir.glob("tmp*"))


def test_a_report_is_written_again_from_files_alone_even_where_the_runs_were_moved(
    tuned_and_base: Path,
) -> None:
    Evaluator(config(tuned_and_base)).run()
    (tuned_and_base / "runs").rename(tuned_and_base / "moved")
    (tuned_and_base / "moved" / "tuned" / "report.html").unlink()
    files = report_run(tuned_and_base / "moved" / "tuned")
    assert files.report_path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_without_scores_says_to_evaluate_first(tuned_and_base: Path) -> None:
    with pytest.raises(EvaluationError, match="tuneproof evaluate"):
        report_run(tuned_and_base / "runs" / "tuned")


@pytest.mark.parametrize(
    "changed", ["scores.jsonl", "inferencer_output.jsonl", "evaluator_output_summary.json"]
)
def test_a_report_is_not_made_of_files_that_are_not_of_one_evaluation(
    tuned_and_base: Path, changed: str
) -> None:
    Evaluator(config(tuned_and_base)).run()
    run_dir = tuned_and_base / "runs" / "tuned"
    content = (run_dir / changed).read_bytes()
    place = content.index(b"0.75") + 2 if changed.startswith("evaluator") else len(content) // 2
    (run_dir / changed).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(EvaluationError, match=changed) as caught:
        report_run(run_dir)
    assert "run `tuneproof evaluate` again" in str(caught.value.next_step)


def test_an_evaluation_that_is_killed_before_its_summary_leaves_no_report_of_two(
    tuned_and_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tuned_and_base / "runs" / "tuned"
    Evaluator(config(tuned_and_base)).run()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.core.evaluation.evaluate.write_summary", killed)
        with pytest.raises(KeyboardInterrupt):
            score_run(run_dir, None, EvaluatorConfig(metrics=("f1",), bootstrap_resamples=100))
    assert not (run_dir / "report.html").exists()
    with pytest.raises(EvaluationError, match=r"scores.jsonl is not the file"):
        report_run(run_dir)
    assert Evaluator(config(tuned_and_base)).earlier_summary() is None


def test_a_summary_of_an_older_version_is_read_and_reported(tuned_and_base: Path) -> None:
    run_dir = tuned_and_base / "runs" / "tuned"
    Evaluator(config(tuned_and_base)).run()
    path = run_dir / "evaluator_output_summary.json"
    content = json.loads(path.read_text())
    del content["content_sha256"], content["scores_sha256"]
    path.write_text(json.dumps(content))
    assert report_run(run_dir).report_path.is_file()


def test_a_run_that_is_a_link_to_elsewhere_is_not_written_into(tuned_and_base: Path) -> None:
    (tuned_and_base / "runs" / "tuned").rename(tuned_and_base / "elsewhere")
    (tuned_and_base / "runs" / "tuned").symlink_to(tuned_and_base / "elsewhere")
    with pytest.raises(StorageError, match="tuned is a symbolic link that leads out of"):
        Evaluator(config(tuned_and_base)).run()
    assert not (tuned_and_base / "elsewhere" / "scores.jsonl").exists()


def test_scores_of_other_predictions_are_not_put_into_a_report(tuned_and_base: Path) -> None:
    Evaluator(config(tuned_and_base)).run()
    scores_path = tuned_and_base / "runs" / "tuned" / "scores.jsonl"
    scores_path.write_text("".join(scores_path.read_text().splitlines(keepends=True)[1:]))
    assert next(read_scores(scores_path)).id == "0001-0"
    with pytest.raises(EvaluationError, match=r"scores.jsonl is not the file"):
        report_run(tuned_and_base / "runs" / "tuned")
    summary_path = tuned_and_base / "runs" / "tuned" / "evaluator_output_summary.json"
    content = json.loads(summary_path.read_text())  # as older versions wrote it
    del content["content_sha256"], content["scores_sha256"]
    summary_path.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match="scores of other predictions"):
        report_run(tuned_and_base / "runs" / "tuned")


HOSTILE = [
    "=1+1",
    "@SUM(A1)",
    "-2+3",
    "http://example.com/",
    "mailto:a@b.c",
    "\x00\x07\x1b[31mred\ufffe",
    "x" * 40_000,
]


def test_the_spreadsheet_shows_hostile_texts_as_texts_and_marks_what_was_cut(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [row(i, text, text) for i, text in enumerate(HOSTILE)])
    evaluate_run(run_dir, None, EvaluatorConfig(metrics=("exact_match",), bootstrap_resamples=100))
    book = openpyxl.load_workbook(run_dir / "evaluator_output_detailed.xlsx")
    assert book.sheetnames == ["scores", "rows", "settings"]
    sheet = book["rows"]
    header = [cell.value for cell in sheet[1]]
    answers = [line[header.index("candidate answer")] for line in sheet.iter_rows(min_row=2)]
    for cell, text in zip(answers[:5], HOSTILE, strict=False):
        assert (cell.value, cell.data_type, cell.hyperlink) == (text, "s", None)
    assert answers[5].value == "\ufffd\ufffd\ufffd[31mred\ufffd"
    assert len(answers[6].value) == 32_767
    assert answers[6].value.endswith("[cut: a cell holds 32,767 characters]")


def test_the_spreadsheet_holds_scores_with_intervals_and_all_rows(tuned_and_base: Path) -> None:
    summary = Evaluator(config(tuned_and_base)).run()
    book = openpyxl.load_workbook(tuned_and_base / "runs" / "tuned" / "evaluator_output_detailed.xlsx")
    scores = list(book["scores"].iter_rows(values_only=True))
    assert [line[0] for line in scores[1:]] == [metric.name for metric in summary.candidate.metrics]
    first = dict(zip(scores[0], scores[1], strict=True))
    assert (first["candidate"], first["baseline"], first["wins"]) == (0.75, 0.125, 25)
    assert book["rows"].max_row == 41
    settings = dict(book["settings"].iter_rows(min_row=2, values_only=True))
    assert settings["candidate run_name"] == "tuned"
    assert settings["confidence"] == 0.95


# --- what was evaluated before


def _evaluated(root: Path) -> None:
    """Evaluate runs/tuned."""
    Evaluator(config(root), run="tuned").run()


def _promote(root: Path, name: str, right: int) -> None:
    """Make a model with a run of its own the promoted one."""
    training(root / "models" / name)
    (root / "models" / name / "adapter_model.safetensors").write_bytes(name.encode())
    digest = weights_sha256(root / "models" / name)
    if not (root / "runs" / name).exists():
        write_run(root / "runs" / name, sums(40, right), model_id=str(root / "models" / name), adapter=digest)
    (root / "models" / "promoted.json").write_text(json.dumps({"run_name": name}))


def test_what_was_found_about_the_same_answers_and_opponents_is_not_looked_for_again(
    tuned_and_base: Path,
) -> None:
    _evaluated(tuned_and_base)
    earlier = Evaluator(config(tuned_and_base), run="tuned").earlier_summary()
    assert earlier is not None and earlier.candidate.run_name == "tuned"


def test_a_champion_that_replaced_another_makes_an_earlier_verdict_stale(tuned_and_base: Path) -> None:
    _promote(tuned_and_base, "strong", 35)
    _evaluated(tuned_and_base)
    assert Evaluator(config(tuned_and_base), run="tuned").earlier_summary() is not None
    _promote(tuned_and_base, "weak", 10)
    assert Evaluator(config(tuned_and_base), run="tuned").earlier_summary() is None
    _evaluated(tuned_and_base)
    (tuned_and_base / "models" / "promoted.json").unlink()
    assert Evaluator(config(tuned_and_base), run="tuned").earlier_summary() is None


def test_a_champion_without_a_run_makes_an_earlier_verdict_stale_until_it_is_told(
    tuned_and_base: Path,
) -> None:
    _evaluated(tuned_and_base)
    _promote(tuned_and_base, "unasked", 35)
    (tuned_and_base / "runs" / "unasked").rename(tuned_and_base / "away")
    assert Evaluator(config(tuned_and_base), run="tuned").earlier_summary() is None
    _evaluated(tuned_and_base)
    assert Evaluator(config(tuned_and_base), run="tuned").earlier_summary() is not None


def test_a_candidate_that_was_promoted_keeps_the_verdict_that_led_to_it(tuned_and_base: Path) -> None:
    shutil.rmtree(tuned_and_base / "runs" / "tuned")
    _promote(tuned_and_base, "tuned", 30)
    (tuned_and_base / "models" / "promoted.json").unlink()
    _evaluated(tuned_and_base)
    _promote(tuned_and_base, "tuned", 30)
    earlier = Evaluator(config(tuned_and_base), run="tuned").earlier_summary()
    assert earlier is not None and earlier.verdict is not None and earlier.verdict.against == "base"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluator.metrics", ["exact_match"]),
        ("evaluator.error_rows", "excluded"),
        ("evaluator.confidence", 0.9),
        ("gate.minimum_rows", 31),
    ],
)
def test_other_metrics_or_rules_make_an_earlier_verdict_stale(
    tuned_and_base: Path, key: str, value: object
) -> None:
    _evaluated(tuned_and_base)
    other = with_overrides(config(tuned_and_base), {key: value})
    assert Evaluator(other, run="tuned").earlier_summary() is None


# --- what can be known before a model is trained


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"gate.primary_metric": "nonsense"}, "names the metric 'nonsense', which is not computed"),
        ({"evaluator.metrics": ["nosuchmodule:x"]}, "the module 'nosuchmodule' cannot be imported"),
        ({"evaluator.metrics": ["regex_match:("]}, "unterminated subpattern"),
        (
            {"evaluator.metrics": ["semantic_similarity"], "evaluator.embedding": "local:/nowhere"},
            "no file or directory /nowhere",
        ),
        (
            {"evaluator.metrics": ["factual_correctness"], "evaluator.llm": "local:/nowhere"},
            "no file or directory /nowhere",
        ),
    ],
    ids=["gate", "function", "pattern", "embedding", "judge"],
)
def test_settings_that_an_evaluation_refuses_are_found_without_any_run(
    tmp_path: Path, settings: dict[str, object], what: str
) -> None:
    changed = with_overrides(config(tmp_path), settings)
    with pytest.raises(TuneproofError, match=re.escape(what)):
        Evaluator(changed).check()


def test_a_missing_package_is_found_without_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"bert_score", "sentence_transformers"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    for metric, package in (("bert_score", "bert-score"), ("semantic_similarity", "sentence-transformers")):
        changed = with_overrides(config(tmp_path), {"evaluator.metrics": [metric]})
        with pytest.raises(EvaluationError, match=f"{package} is not installed"):
            Evaluator(changed).check()
