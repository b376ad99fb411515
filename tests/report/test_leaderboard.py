"""All runs side by side: what is ranked with what, which figures count, and the page for a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.evaluation.outputs import EvaluationFiles, write_summary
from tasks.core.report.leaderboard import Leaderboard, read_leaderboard
from tasks.core.report.leaderboard_page import write_leaderboard
from tests.making.evaluation_runs import decided, evaluate_run, row, sums, write_run

SETTINGS = EvaluatorConfig(metrics=("exact_match", "truncation_rate"), bootstrap_resamples=100)
OTHER_ROWS = "e" * 64


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Over the same rows: tuned (30 of 40 right, evaluated against base), base (5), hot (not evaluated).

    Over other rows: elsewhere (40 of 40 right). Besides: a run that is not finished and an empty folder.
    """
    runs = tmp_path / "runs"
    tuned = write_run(
        runs / "tuned", sums(40, 30), model_id="models/tuned", finished_at="2026-01-02T00:00:00+00:00"
    )
    base = write_run(runs / "base", sums(40, 5))
    champion = write_run(tmp_path / "champion", sums(40, 20))
    summary = decided(
        evaluate_run(tuned, base, SETTINGS), evaluate_run(tuned, champion, SETTINGS), "inconclusive"
    )
    write_summary(EvaluationFiles(tuned).summary_path, summary)
    write_run(runs / "hot", sums(40, 1), temperature=1.5)
    elsewhere = write_run(runs / "elsewhere", sums(40, 40), rows_sha256=OTHER_ROWS)
    evaluate_run(elsewhere, None, SETTINGS)
    (runs / "begun").mkdir()
    (runs / "begun" / "ledger.jsonl").write_text("")
    (runs / "empty").mkdir()
    return runs


def board_of(runs_dir: Path) -> Leaderboard:
    return read_leaderboard(runs_dir, runs_dir.parent / "models")


def test_runs_over_other_rows_are_not_ranked_together(runs_dir: Path) -> None:
    groups = {group.rows_sha256: [run.path.name for run in group.runs] for group in board_of(runs_dir).groups}
    assert groups == {"d" * 64: ["tuned", "base", "hot"], OTHER_ROWS: ["elsewhere"]}


def test_a_run_that_was_only_a_baseline_shows_the_scores_it_got_there(runs_dir: Path) -> None:
    tuned, base, hot = board_of(runs_dir).groups[0].runs
    assert [run.value("exact_match") for run in (tuned, base, hot)] == [0.75, 0.125, None]
    assert [run.decision for run in (tuned, base, hot)] == ["inconclusive", None, None]
    assert tuned.report_path and base.report_path is None


def test_runs_without_answers_are_listed_apart_with_the_reason(runs_dir: Path) -> None:
    assert board_of(runs_dir).unfinished == (
        ("begun", "unfinished; the same command resumes it"),
        ("empty", "no answers"),
    )


def test_settings_that_not_all_runs_of_a_group_share_are_told(runs_dir: Path) -> None:
    settings = {run.path.name: dict(run.settings) for run in board_of(runs_dir).groups[0].runs}
    assert settings["hot"] == {"temperature": "1.5"}
    assert settings["base"] == {"temperature": "1.0"}


def test_a_metric_of_which_less_is_better_ranks_the_smallest_first(tmp_path: Path) -> None:
    for name, cut in (("often", 30), ("seldom", 3), ("never", 0)):
        rows = [row(i, "x", "x", finish_reason="length" if i < cut else "stop") for i in range(40)]
        evaluate_run(write_run(tmp_path / name, rows), None, EvaluatorConfig(metrics=("truncation_rate",)))
    (group,) = read_leaderboard(tmp_path, tmp_path).groups
    assert [run.path.name for run in group.runs] == ["never", "seldom", "often"]


def test_runs_are_ranked_by_a_metric_that_has_a_better_and_a_worse(tmp_path: Path) -> None:
    settings = EvaluatorConfig(metrics=("length", "exact_match"), bootstrap_resamples=100)
    for name, right in (("poor", 3), ("good", 30)):  # wrong answers are longer
        evaluate_run(write_run(tmp_path / name, sums(40, right)), None, settings)
    (group,) = read_leaderboard(tmp_path, tmp_path).groups
    assert [run.path.name for run in group.runs] == ["good", "poor"]
    assert [metric.name for metric in group.metrics] == ["exact_match", "answer_characters", "answer_words"]


def test_runs_that_are_only_described_come_newest_first(tmp_path: Path) -> None:
    settings = EvaluatorConfig(metrics=("length",), bootstrap_resamples=100)
    for month, right in (("01", 30), ("02", 3), ("03", 15)):
        finished = f"2026-{month}-01T00:00:00+00:00"
        evaluate_run(write_run(tmp_path / month, sums(40, right), finished_at=finished), None, settings)
    (group,) = read_leaderboard(tmp_path, tmp_path).groups
    assert [run.path.name for run in group.runs] == ["03", "02", "01"]


def test_scores_of_answers_that_were_replaced_are_not_shown(runs_dir: Path) -> None:
    import shutil

    shutil.copy(runs_dir / "tuned" / "evaluator_output_summary.json", runs_dir / "hot")
    hot = next(run for run in board_of(runs_dir).groups[0].runs if run.path.name == "hot")
    assert (hot.scores, hot.decision, hot.report_path) == (None, None, None)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"], ids=["empty", "object", "not text"])
def test_a_damaged_summary_hides_its_figures_and_nothing_else(runs_dir: Path, content: bytes) -> None:
    (runs_dir / "elsewhere" / "evaluator_output_summary.json").write_bytes(content)
    board = board_of(runs_dir)
    assert [len(group.runs) for group in board.groups] == [3, 1]
    assert board.groups[1].metrics == ()


def test_the_promoted_models_runs_are_marked(runs_dir: Path) -> None:
    models = runs_dir.parent / "models"
    models.mkdir()
    (models / "promoted.json").write_text('{"run_name": "tuned"}')
    marked = [run.path.name for group in board_of(runs_dir).groups for run in group.runs if run.promoted]
    assert marked == ["tuned"]


def test_error_policies_that_differ_within_a_group_are_told(runs_dir: Path, tmp_path: Path) -> None:
    excluded = EvaluatorConfig(metrics=("exact_match",), error_rows="excluded", bootstrap_resamples=100)
    evaluate_run(runs_dir / "hot", None, excluded)
    board = board_of(runs_dir)
    assert [group.policies_differ for group in board.groups] == [True, False]
    write_leaderboard(tmp_path / "page.html", board, runs_dir=runs_dir)
    assert "their figures do not compare" in (tmp_path / "page.html").read_text()


def test_the_page_asks_for_nothing_and_links_to_the_reports_from_where_it_lies(runs_dir: Path) -> None:
    page_path = runs_dir.parent / "pages" / "board.html"
    write_leaderboard(page_path, board_of(runs_dir), runs_dir=runs_dir)
    html = page_path.read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in html
    assert not re.search(r"<(link|img|iframe)|\bsrc=", html)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    links = [run["href"] for group in data for run in group["runs"]]
    assert links == ["../runs/tuned/report.html", None, None, "../runs/elsewhere/report.html"]
    assert all((page_path.parent / link).is_file() for link in links if link)


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)<"
    write_run(tmp_path / "run", sums(4, 2), model_id=f"models/{name}")
    write_leaderboard(tmp_path / "page.html", read_leaderboard(tmp_path, tmp_path), runs_dir=tmp_path)
    assert "<script>alert" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_without_runs_says_how_to_get_the_first(tmp_path: Path) -> None:
    board = read_leaderboard(tmp_path / "runs", tmp_path)
    write_leaderboard(tmp_path / "page.html", board, runs_dir=tmp_path / "runs")
    assert "tuneproof infer makes one" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_long_list_says_what_a_styled_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli.console import show_table

    rows = [("run-1 中", "[red]", None), ("b", ":smile:", 3.5)]
    show_table("All runs", ("run", "finished", "speed"), rows, of_rows=1000)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "All runs"
    assert [re.split(r" {2,}", line.strip()) for line in lines if line and "─" not in line] == [
        ["run", "finished", "speed"], ["run-1 中", "[red]"], ["b", ":smile:", "3.5"],
    ]  # fmt: skip
    show_table("All runs", ("run",), [("x" * 500,)], of_rows=1000)  # folded, as in a short table
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 200
