"""`compare`, `report`, `runs --html` and scoring again: files only, no model, nobody else's files touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.outputs import read_summary
from tasks.core.report.writing import compare_runs
from tests.commands.test_cli import environment, tuneproof
from tests.making.evaluation_runs import evaluate_run, sums, training, write_run

SETTINGS = EvaluatorConfig(metrics=("exact_match",), bootstrap_resamples=100)
MODEL_LIBRARIES = ("torch", "transformers", "peft", "sentence_transformers")
# Runs a command and tells which model libraries it imported.
WATCHED = f"""
import sys
from flows.cli.commands import main
code = main(sys.argv[1:])
print("model libraries:", *(name for name in {MODEL_LIBRARIES!r} if name in sys.modules))
sys.exit(code)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """runs/tuned (30 of 40 right), runs/base (5 of 40), models/tuned and a config.toml."""
    training(tmp_path / "models" / "tuned")
    write_run(
        tmp_path / "runs" / "tuned",
        sums(40, 30),
        model_id=str(tmp_path / "models" / "tuned"),
        adapter="b" * 64,
        finished_at="2026-01-02T00:00:00+00:00",
    )
    write_run(tmp_path / "runs" / "base", sums(40, 5))
    (tmp_path / "config.toml").write_text(
        '[evaluator]\nmetrics = ["exact_match"]\nbootstrap_resamples = 100\n'
    )
    return tmp_path


def watched(folder: Path, *tokens: str, **more: str) -> tuple[str, list[str]]:
    """Run a command; give what it printed and the model libraries it imported."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *tokens],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed, _, libraries = done.stdout.rpartition("model libraries:")
    return printed, libraries.split()


def test_two_runs_are_compared_without_touching_their_own_evaluations(folder: Path) -> None:
    tuned, base = folder / "runs" / "tuned", folder / "runs" / "base"
    evaluate_run(tuned, None, SETTINGS)
    before = contents(tuned), contents(base)
    summary, files = compare_runs(base, tuned, SETTINGS)
    assert summary.comparison and summary.comparison.metrics[0].difference == 0.625
    assert summary.verdict is None
    assert files.directory == tuned / "compared-with-base"
    assert files.report_path.is_file()
    assert (contents(tuned), contents(base)) == before


def test_a_comparison_goes_where_it_is_told_and_finds_the_answers_from_there(folder: Path) -> None:
    elsewhere = folder / "deep" / "down"
    _, files = compare_runs(
        folder / "runs" / "base", folder / "runs" / "tuned", SETTINGS, directory=elsewhere
    )
    summary = read_summary(files.summary_path)
    assert (elsewhere / summary.candidate.predictions_path).is_file()
    assert {path.name for path in elsewhere.iterdir()} >= {"report.html", "scores.jsonl"}


def test_a_run_is_not_compared_with_itself(folder: Path) -> None:
    with pytest.raises(EvaluationError, match="are the same run"):
        compare_runs(folder / "runs" / "base", folder / "runs" / "." / "base", SETTINGS)


def test_the_command_prints_both_scores_the_change_and_the_report(folder: Path) -> None:
    printed, libraries = watched(folder, "compare", "base", "tuned")
    assert libraries == []
    line = next(line for line in printed.splitlines() if "exact_match" in line)
    assert [word for word in line.split() if word in {"12.5", "75.0", "+62.5", "better"}] == [
        "12.5", "75.0", "+62.5", "better",
    ]  # fmt: skip
    report = printed.rsplit("report: ", 1)[-1].strip()
    assert Path(report) == folder / "runs" / "tuned" / "compared-with-base" / "report.html"


def test_a_report_is_written_again_from_the_scores(folder: Path) -> None:
    evaluate_run(folder / "runs" / "tuned", folder / "runs" / "base", SETTINGS)
    report = folder / "runs" / "tuned" / "report.html"
    first = report.read_bytes()
    report.unlink()
    printed, libraries = watched(folder, "report", "tuned")
    assert libraries == []
    assert f"report: {report}" in printed
    assert report.read_bytes() == first


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["report", "base"], "run `tuneproof evaluate` first"),
        (["report", "tunde"], "did you mean tuned"),
        (["compare", "base", "nothing"], "there is no run 'nothing'"),
        (["compare", "base", "base"], "are the same run"),
        (["compare", "base", "tuned", "--out", "runs/base/manifest.json"], "manifest.json is a file"),
        (
            ["compare", "base", "tuned", "--out", "runs/base/manifest.json/x"],
            "a part of this path is a file",
        ),
        (["runs", "--html", "a.html", "b.html"], "--html was given 2 paths"),
    ],
    ids=["not evaluated", "misspelt", "unknown", "itself", "a file", "in a file", "two paths"],
)
def test_a_mistake_is_told_without_a_traceback(folder: Path, tokens: list[str], words: str) -> None:
    done = tuneproof(folder, *tokens)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_of_runs_ranks_them_and_writes_a_page(folder: Path) -> None:
    evaluate_run(folder / "runs" / "tuned", folder / "runs" / "base", SETTINGS)
    write_run(folder / "runs" / "elsewhere", sums(10, 10), rows_sha256="e" * 64)
    printed, libraries = watched(folder, "runs", "--html")
    assert libraries == []
    assert printed.index("75.0") < printed.index("12.5")
    assert "best exact_match first" in printed
    assert "10 rows (eeeeeeee); not evaluated" in printed
    assert (folder / "runs" / "leaderboard.html").is_file()
    assert tuneproof(folder, "runs", "--html", "pages/x.html").returncode == 0
    assert (folder / "pages" / "x.html").is_file()


@pytest.mark.server
def test_scoring_again_with_other_metrics_calls_no_model(folder: Path, prefect_server: str) -> None:
    predictions = (folder / "runs" / "tuned" / "inferencer_output.jsonl").read_bytes()
    evaluate_run(folder / "runs" / "tuned", None, SETTINGS)
    other = ("--evaluator.metrics", "exact_match,chrf,f1")
    _, libraries = watched(folder, "evaluate", "--run", "tuned", *other, PREFECT_API_URL=prefect_server)
    assert libraries == []
    summary = read_summary(folder / "runs" / "tuned" / "evaluator_output_summary.json")
    assert [metric.name for metric in summary.candidate.metrics] == ["exact_match", "chrf", "f1"]
    assert summary.baseline and summary.baseline.metric("chrf")
    assert (folder / "runs" / "tuned" / "inferencer_output.jsonl").read_bytes() == predictions
