"""What the Prefect UI gets to show: verdict, scores, lineage and pictures, as text that it renders."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.records import LossPoint
from tasks.core.report.lineage import lineage_boxes, lineage_markdown
from tasks.core.report.plots import Box, chain, data_uri, loss_plot
from tasks.core.storage.store import Store
from tasks.ui.artifacts import file_link, scores_markdown, verdict_markdown
from tests.making.evaluation_runs import decided, evaluate_run, sums, training, write_run

SETTINGS = EvaluatorConfig(metrics=("exact_match", "f1"), bootstrap_resamples=100)
_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def summary(tmp_path: Path) -> EvaluationSummary:
    """A run, tuned (30 of 40 right), against base (5) and champion (20), with a verdict and its training."""
    tuned, base = write_run(tmp_path / "tuned", sums(40, 30)), write_run(tmp_path / "base", sums(40, 5))
    champion = write_run(tmp_path / "champion", sums(40, 20))
    against_champion = evaluate_run(tuned, champion, SETTINGS)
    trained = training(tmp_path / "model|<b>")
    return decided(evaluate_run(tuned, base, SETTINGS, trained), against_champion, "reject")


def test_a_file_of_a_run_at_a_url_is_linked_there_and_not_to_the_mirror(tmp_path: Path) -> None:
    runs = Store("s3://team/runs")
    url = "s3://team/runs/run/report.html"
    assert file_link(runs.local / "run" / "report.html", runs) == (url, url)
    path = tmp_path / "report.html"
    assert file_link(path, Store(str(tmp_path))) == (path.as_uri(), str(path))


def test_the_verdict_tells_decision_reasons_and_every_check(summary: EvaluationSummary) -> None:
    assert summary.verdict is not None
    text = verdict_markdown(summary, summary.verdict)
    assert text.startswith("# Reject: tuned\n")
    assert "Against the champion's run `champion`." in text
    assert "- The second reason." in text
    assert "- **failed**: error_rate. 0 of 40 rows have an error" in text


def test_scores_stand_beside_those_before_and_the_champions_with_intervals(
    summary: EvaluationSummary,
) -> None:
    lines = scores_markdown(summary).splitlines()
    assert "| metric | before | champion | after | change | change from champion |" in lines
    (line,) = [line for line in lines if line.startswith("| Exact match")]
    assert re.findall(r"([+\d.]+) \[", line) == ["12.5", "50.0", "75.0", "+62.5", "+25.0"]
    assert line.count("[") == 5


def test_scores_without_a_baseline_are_one_column(tmp_path: Path) -> None:
    summary = evaluate_run(write_run(tmp_path / "tuned", sums(40, 30)), None, SETTINGS)
    assert "| metric | score |" in scores_markdown(summary)


def test_the_lineage_leads_from_data_to_the_verdict(summary: EvaluationSummary, tmp_path: Path) -> None:
    boxes = lineage_boxes(summary)
    assert [box.heading for box in boxes] == ["training data", "model", "answers", "scores", "verdict"]
    assert boxes[-1] == Box("verdict", ("reject", "against champion"), "bad")
    text = lineage_markdown(summary, tmp_path / "tuned")
    assert summary.candidate.predictions_sha256[:12] in text
    assert str(tmp_path / "tuned" / "report.html") in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {4}


def test_pictures_are_whole_addresses_of_valid_svg(summary: EvaluationSummary, tmp_path: Path) -> None:
    text = lineage_markdown(summary, tmp_path)
    pictures = re.findall(r"\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    assert len(pictures) == 2
    for picture in pictures:
        assert ElementTree.fromstring(base64.b64decode(picture)).tag == f"{_SVG}svg"


def test_names_in_a_picture_are_text_and_fit_their_box() -> None:
    root = ElementTree.fromstring(chain([Box("<x>", ("a" * 80, "</svg><script>"))]))
    texts = [node.text or "" for node in root.iter(f"{_SVG}text")]
    assert texts[0] == "<x>"
    assert len(texts[1]) == 16 and "…" in texts[1]
    assert not list(root.iter(f"{_SVG}script"))


def test_the_loss_curve_marks_the_step_whose_weights_became_the_model() -> None:
    losses = [LossPoint(step=i, epoch=i, loss=2.0, validation_loss=abs(i - 3) + 1.0) for i in range(1, 9)]
    root = ElementTree.fromstring(loss_plot(losses, best_step=3))
    rings = [node for node in root.iter(f"{_SVG}circle") if node.attrib.get("fill") == "none"]
    assert len(rings) == 1
    assert "the model: step 3, 1.000" in [node.text for node in root.iter(f"{_SVG}text")]


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_a_loss_curve_stays_within_its_frame_and_small(count: int) -> None:
    losses = [LossPoint(step=i, epoch=i, loss=5.0 / i, validation_loss=None) for i in range(1, count + 1)]
    svg = loss_plot(losses)
    lines = list(ElementTree.fromstring(svg).iter(f"{_SVG}polyline"))
    assert len(lines) == (1 if count else 0)
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert all(0 <= x <= 720 and 0 <= y <= 260 for x, y in points)
    assert len(data_uri(svg)) < 20_000


def test_an_asset_that_prefect_does_not_take_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.assets import Asset

    from tasks.ui import assets

    def refuse(*_: object, **__: object) -> Any:
        def task(_function: object) -> Any:
            def record() -> None:
                raise RuntimeError("the server is away")

            return record

        return task

    monkeypatch.setattr(assets, "materialize", refuse)
    assets._record(Asset(key="tuneproof://models/x"), (), {})
    assert "an asset could not be recorded: the server is away" in caplog.text
