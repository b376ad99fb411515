"""Which run is evaluated when none is named, and what may be named."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tasks.core.config import EvaluatorConfig, load_config
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.evaluate import score_run
from tasks.core.evaluation.opponents.run_lookup import finished_runs, newest_run
from tasks.core.own_digest import with_own_digest
from tasks.core.runs.manifest import next_order
from tasks.core.runs.run_dir import RunDir
from tasks.evaluator import Evaluator
from tests.making.evaluation_runs import sums, write_run


def test_runs_that_only_serve_a_comparison_are_passed_over_for_the_newest(tmp_path: Path) -> None:
    runs_dir, later, rows = tmp_path / "runs", "2026-01-03T00:00:00+00:00", sums(4, 2)
    write_run(runs_dir / "tuned", rows, adapter="b" * 64)
    write_run(runs_dir / "base", rows, finished_at=later)
    probe = write_run(tmp_path / "probe", rows, adapter="9" * 64)
    key = RunDir(probe).read_manifest().run_key
    write_run(runs_dir / f"champion-sums-{key[:8]}", rows, adapter="9" * 64, finished_at=later)
    assert newest_run(runs_dir, None).name == "tuned"
    shutil.rmtree(runs_dir / "tuned")
    write_run(runs_dir / "other-model", rows, weights="f" * 64)
    assert newest_run(runs_dir, None).name == "other-model"


def test_where_every_run_serves_a_comparison_the_newest_is_taken(tmp_path: Path) -> None:
    rows = sums(4, 2)
    key = RunDir(write_run(tmp_path / "probe", rows)).read_manifest().run_key
    write_run(tmp_path / "runs" / f"base-sums-{key[:8]}", rows)
    assert newest_run(tmp_path / "runs", "sums.jsonl").name == f"base-sums-{key[:8]}"


def test_the_newest_run_is_the_one_that_finished_last_whatever_the_clock_said(tmp_path: Path) -> None:
    """The first one finished while the clock was far ahead, and the last one after it was set back again."""
    for name, moment in (("first", "2099-01-01T00:00:00+00:00"), ("old", "2026-01-01T00:00:00+00:00")):
        write_run(tmp_path / name, sums(4, 2), finished_at=moment)
    second = write_run(tmp_path / "second", sums(4, 2))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text('{"order": 1e300, "finished_at": 7}')
    order = next_order(tmp_path)
    manifest = RunDir(second).read_manifest().model_copy(update={"order": order})
    (second / "manifest.json").write_text(manifest.model_dump_json())
    assert [run.path.name for run in finished_runs(tmp_path)] == ["second", "first", "old"]
    assert next_order(tmp_path) == order + 1
    assert abs(next_order(tmp_path / "none") - time.time() * 1000) < 60_000


def test_a_file_of_answers_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text('{"question": "What is 1 + 1?", "predicted_answer": "2", "ground_truth": "2"}\n')
    score_run(path, None, EvaluatorConfig(metrics=("exact_match",), bootstrap_resamples=100))
    assert (tmp_path / "answers.evaluation" / "scores.jsonl").is_file()


def test_the_notes_of_an_evaluation_tell_that_prompts_were_cut(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "tuned", sums(4, 2))
    manifest = RunDir(run_dir).read_manifest().model_copy(update={"truncated_prompt_count": 3})
    (run_dir / "manifest.json").write_text(manifest.model_dump_json())
    summary = score_run(run_dir, None, EvaluatorConfig(metrics=("exact_match",), bootstrap_resamples=100))
    assert "3 of 4 prompts of the candidate were cut on the left to fit." in summary.notes


def test_a_manifest_in_which_a_figure_was_changed_is_damaged(tmp_path: Path) -> None:
    run = RunDir(write_run(tmp_path / "run", sums(4, 2)))
    content = with_own_digest(run.read_manifest().model_dump(mode="json"))
    run.manifest_path.write_text(json.dumps(content))
    assert run.read_manifest().generation_seconds == 20.0
    run.manifest_path.write_text(json.dumps({**content, "generation_seconds": 2.0}))
    with pytest.raises(EvaluationError, match="its content has another digest than it tells"):
        run.read_manifest()
    for damaged in ("", "[]", "7", "{}", '{"format": 1', "\0" * 40):
        run.manifest_path.write_text(damaged)
        with pytest.raises(EvaluationError, match="is damaged"):
            run.read_manifest()


def test_opponents_that_a_pipeline_has_run_are_taken_and_no_others_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_dir, rows = tmp_path / "runs", sums(4, 2)
    tuned = write_run(runs_dir / "tuned", rows, adapter="b" * 64)
    given = write_run(runs_dir / "base", rows)
    write_run(runs_dir / "base-of-somebody", rows, finished_at="2026-01-03T00:00:00+00:00")
    places = {"pipeline.runs_dir": str(runs_dir), "pipeline.models_dir": str(tmp_path / "models")}
    config = load_config(None, places, {})
    alone = Evaluator(config, run="tuned").find_runs()
    assert alone.baseline_path == runs_dir / "base-of-somebody"

    def search(runs_dir: Path) -> None:
        raise AssertionError("runs are searched")

    monkeypatch.setattr("tasks.core.evaluation.opponents.run_lookup.finished_runs", search)
    runs = Evaluator(config, run="tuned", opponents=(given,)).find_runs()
    assert (runs.candidate_path, runs.baseline_path, runs.baseline_kind) == (tuned, given, "base")


def test_a_given_opponent_of_other_rows_or_weights_is_not_taken_for_the_base(tmp_path: Path) -> None:
    runs_dir, rows = tmp_path / "runs", sums(4, 2)
    write_run(runs_dir / "tuned", rows, adapter="b" * 64)
    base = write_run(runs_dir / "base", rows)
    stranger = write_run(runs_dir / "stranger", rows, weights="f" * 64)
    elsewhere = write_run(runs_dir / "elsewhere", rows, rows_sha256="e" * 64)
    places = {"pipeline.runs_dir": str(runs_dir), "pipeline.models_dir": str(tmp_path / "models")}
    evaluator = Evaluator(load_config(None, places, {}), run="tuned", opponents=(stranger, elsewhere))
    assert evaluator.find_runs().baseline_path == base
