"""The report as a file: answer first, self-contained, hostile rows as text, within its size."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.evaluation.outputs import EvaluationFiles, write_summary
from tasks.core.evaluation.summary import Decision
from tasks.core.evaluation.wording import shown, shown_difference
from tasks.core.metrics.usage import JudgeUsage
from tasks.core.records import ModelManifest, Prediction
from tasks.core.report import report
from tasks.core.report.html_page import duration
from tasks.core.report.writing import report_run
from tests.making.evaluation_runs import decided, evaluate_run, row, sums, training, write_run

SETTINGS = EvaluatorConfig(metrics=("exact_match", "f1"), bootstrap_resamples=200)
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "&lt;b&gt; \u2028 \u2029 \x00 \x1b[31m \u202e",
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """Tags with attributes, script contents by id, and the text of headings and notes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[0] == "script":
            self.scripts.append((self._inside[1], data))
        elif not self._inside or self._inside[0] != "style":
            self.text.append(data)

    def script(self, identifier: str) -> str:
        return "".join(data for attributes, data in self.scripts if attributes.get("id") == identifier)

    def rows(self) -> list[dict[str, object]]:
        unpacked: list[dict[str, object]] = json.loads(
            gzip.decompress(base64.b64decode(self.script("packed-rows")))
        )
        return unpacked


def report_of(
    tmp_path: Path,
    tuned: list[Prediction],
    base: list[Prediction] | None = None,
    trained: ModelManifest | None = None,
) -> str:
    candidate_dir = write_run(tmp_path / "tuned", tuned)
    baseline_dir = None if base is None else write_run(tmp_path / "base", base)
    evaluate_run(candidate_dir, baseline_dir, SETTINGS, trained)
    return (candidate_dir / "report.html").read_text(encoding="utf-8")


def test_the_answer_comes_before_all_figures(tmp_path: Path) -> None:
    page = Page(report_of(tmp_path, sums(40, 30), sums(40, 5)))
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert text.index("The candidate is better than its baseline.") < text.index("Scores")
    assert "Exact match 75.0 against 12.5, a difference of +62.5 points" in text


def test_a_worse_candidate_is_said_to_be_worse(tmp_path: Path) -> None:
    assert '<h1 id="answer">The candidate is worse than its baseline.</h1>' in report_of(
        tmp_path, sums(40, 5), sums(40, 30)
    )


def test_a_difference_within_the_noise_is_said_to_be_unproven(tmp_path: Path) -> None:
    html = report_of(tmp_path, sums(40, 11), sums(40, 10))
    assert "No difference from the baseline can be shown." in html


def test_a_report_without_a_baseline_shows_the_score_alone(tmp_path: Path) -> None:
    html = report_of(tmp_path, sums(40, 30))
    assert '<h1 id="answer">Exact match is 75.0.</h1>' in html
    assert ">Before<" not in html


@pytest.mark.parametrize("decision", ["promote", "reject", "inconclusive"])
def test_a_verdict_comes_first_with_its_reasons_and_then_its_checks(
    tmp_path: Path, decision: Decision
) -> None:
    candidate_dir = write_run(tmp_path / "tuned", sums(40, 30))
    champion_dir = write_run(tmp_path / "champion", sums(40, 20))
    summary = evaluate_run(candidate_dir, write_run(tmp_path / "base", sums(40, 5)), SETTINGS)
    write_summary(
        EvaluationFiles(candidate_dir).summary_path,
        decided(summary, evaluate_run(candidate_dir, champion_dir, SETTINGS), decision),
    )
    page = Page(report_run(candidate_dir).report_path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", " ".join(page.text))
    in_order = [
        "Verdict against the champion, champion",
        decision.capitalize(),
        "The first reason <b>.",
        "3 checks: 1 passed, 1 failed, 1 skipped",
        "0 of 40 rows have an error",
        "The candidate is better than its baseline.",
        "Change from champion",
    ]
    positions = [text.index(words) for words in in_order]
    assert positions == sorted(positions)
    assert re.search(r"Before Champion After", re.sub(r"\s+", " ", text))
    assert ("open" in next(a for t, a in page.tags if a.get("class") == "checks")) == (decision != "promote")


def test_a_verdict_against_the_baseline_is_the_only_finding_that_is_told(tmp_path: Path) -> None:
    candidate_dir = write_run(tmp_path / "tuned", sums(40, 30))
    summary = evaluate_run(candidate_dir, write_run(tmp_path / "base", sums(40, 5)), SETTINGS)
    verdict = decided(summary, summary, "inconclusive").verdict
    assert verdict is not None
    verdict = verdict.model_copy(update={"against": "base"})
    write_summary(
        EvaluationFiles(candidate_dir).summary_path, summary.model_copy(update={"verdict": verdict})
    )
    html = report_run(candidate_dir).report_path.read_text(encoding="utf-8")
    page, settings = html.split('id="settings"')[0], "The candidate is better than its baseline."
    assert "Inconclusive" in page and settings not in page


def test_what_the_judge_did_and_cost_is_told(tmp_path: Path) -> None:
    candidate_dir = write_run(tmp_path / "tuned", sums(40, 30))
    summary = evaluate_run(candidate_dir, None, SETTINGS)
    judge = JudgeUsage(
        model="judge-<1>",
        calls=1200,
        cached=300,
        failures={"timeout": 2, "no JSON": 3},
        input_tokens=9000,
        output_tokens=70,
        cost_dollars=0.25,
    )
    judged = summary.model_copy(update={"judge": judge})
    write_summary(EvaluationFiles(candidate_dir).summary_path, judged)
    page = Page(report_run(candidate_dir).report_path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert "judge-<1> (judge, on this machine) 1,200 300 5 9,000, 70 $ 0.2500" in text


def test_the_report_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    page = Page(report_of(tmp_path, sums(20, 10), sums(20, 5)))
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not (attributes.get("href") or "#").startswith("http")
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-inline'; img-src" in policy and "script-src 'sha256-" in policy


def test_every_script_of_the_report_is_allowed_by_its_digest_and_no_other(tmp_path: Path) -> None:
    html = report_of(tmp_path, sums(10, 5))
    page = Page(html)
    policy = next(a["content"] or "" for t, a in page.tags if t == "meta" and "http-equiv" in a)
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    found = {
        base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
        for attributes, data in page.scripts
        if "id" not in attributes
    }
    assert found == allowed
    assert len(allowed) == 7


def test_hostile_rows_add_no_tag_to_the_page(tmp_path: Path) -> None:
    def numbered(texts: list[str]) -> list[Prediction]:
        return [row(i, text, text, question=text, system_prompt=text) for i, text in enumerate(texts)]

    plain = report_of(tmp_path / "plain", numbered([f"plain {i}" for i in range(len(HOSTILE))]))
    hostile = report_of(tmp_path / "hostile", numbered(HOSTILE))
    tags = [[tag for tag, _ in Page(html).tags] for html in (plain, hostile)]
    assert tags[0] == tags[1]
    assert [r["c"]["t"] for r in Page(hostile).rows()] == HOSTILE  # type: ignore[index]


def test_hostile_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    trained = training(tmp_path / "model").model_copy(update={"training_data_id": "<b onclick=alert(1)>x"})
    html = report_of(tmp_path, sums(10, 5), sums(10, 2), trained)
    assert "<b onclick" not in html
    assert "&lt;b onclick=alert(1)&gt;x" in html


def test_the_report_shows_training_speed_memory_and_perplexity(tmp_path: Path) -> None:
    page = Page(report_of(tmp_path, sums(20, 10), None, training(tmp_path / "model")))
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for shown_text in ("300 rows of train.jsonl, 20 steps", "1 min 5 s", "50 tokens/s", "2.00 GB", "3.25"):
        assert shown_text in text
    assert len(json.loads(page.script("overview"))["losses"]) == 20


def test_a_thousand_rows_with_long_texts_stay_within_five_megabytes(tmp_path: Path) -> None:
    import random

    random.seed(0)
    texts = [random.randbytes(6000).hex(" ", 64) for _ in range(1000)]
    html = report_of(tmp_path, [row(i, text, text[:3000]) for i, text in enumerate(texts)])
    assert len(html.encode()) < 5_000_000
    assert "Texts are cut after" in html


def test_texts_are_cut_until_the_whole_file_is_within_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    monkeypatch.setattr(report, "FILE_BYTES", 1_400_000)
    random.seed(0)
    signs = "".join(random.choices([chr(code) for code in range(0x4E00, 0x57C4)], k=560_000))
    texts = iter(signs[start : start + 700] for start in range(0, len(signs), 700))
    rows = [row(i, next(texts), next(texts), question=next(texts)) for i in range(200)]
    base = [other.model_copy(update={"predicted_answer": next(texts)}) for other in rows]
    assert 1_000_000 < len(report_of(tmp_path, rows, base).encode()) <= 1_400_010


def test_a_megabyte_answer_is_cut_with_a_mark(tmp_path: Path) -> None:
    html = report_of(tmp_path, [row(0, "y" * 1_000_000, "yes")])
    assert len(html.encode()) < 1_500_000
    text = str(Page(html).rows()[0]["c"])
    assert "[980,000 more characters]" in text


def test_beyond_the_limit_rows_with_errors_and_the_largest_changes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "EMBEDDED_ROWS", 10)
    tuned = sums(60, 20)
    tuned[57] = row(57, "", "114", error="out of memory")
    base = sums(60, 17)
    html = report_of(tmp_path, tuned, base)
    page = Page(html)
    numbers = [r["n"] for r in page.rows()]
    assert numbers == [*range(1, 7), 18, 19, 20, 58]
    assert "10 of 60 rows are in this file" in html
    counts = json.loads(page.script("overview"))["metrics"][0]
    assert sum(counts["candidate"]) == 60
    assert counts["outcomes"] == {"both": 17, "gained": 3, "lost": 0, "neither": 40}


def test_histograms_count_every_scored_row_once(tmp_path: Path) -> None:
    page = Page(report_of(tmp_path, [*sums(30, 12), row(99, "x", None)], sums(30, 6)))
    for metric in json.loads(page.script("overview"))["metrics"]:
        assert sum(metric["candidate"]) == 30
        assert sum(metric["baseline"]) == 30
        assert sum(metric["change"]) == 30


def test_the_same_evaluation_renders_the_same_rows(tmp_path: Path) -> None:
    first, second = (Page(report_of(tmp_path / name, sums(20, 10))) for name in ("a", "b"))
    assert first.script("packed-rows") == second.script("packed-rows")


def test_each_embedded_library_has_its_licence_beside_it_and_is_listed() -> None:
    assets = Path(report.__file__).parent / "assets"
    listed = (assets / "VENDORED.md").read_text(encoding="utf-8")
    libraries = sorted(path.name for path in assets.glob("*.min.js"))
    assert len(libraries) == 4
    for name in libraries:
        assert name in listed
        assert (assets / name.replace(".min.js", ".LICENSE")).stat().st_size > 500


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.21, "3.2 s"), (42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_figures_are_shown_with_a_true_minus_and_no_sign_for_nothing() -> None:
    assert shown(0.1234, True) == "12.3"
    assert shown_difference(-0.05, True) == "\N{MINUS SIGN}5.0"
    assert shown_difference(-0.0001, True) == "0.0"
    assert shown_difference(12.5, False) == "+12.5"
    assert shown(18670.4, False) == "18,670"
    assert shown_difference(-1234.5, False) == "\N{MINUS SIGN}1,234"


def test_the_documentation_names_every_field_and_every_metric() -> None:
    from tasks.core.evaluation import summary as records
    from tasks.core.evaluation.outputs import RowScores
    from tasks.core.metrics.catalogue import available, reported
    from tasks.core.records import PredictionMetadata, RunManifest

    pages = [Path(__file__).parents[2] / "docs" / name for name in ("read-the-outputs.md", "metrics.md")]
    page = "".join(path.read_text(encoding="utf-8") for path in pages)
    named = (
        {"metadata"}
        | set(re.findall(r"`(?:metadata\.)?([\w:]+)`", page))
        | set(re.findall(r'"(\w+)":', page))
    )
    documented = (
        records.EvaluationSummary, records.RunSummary, records.MetricSummary, records.Comparison,
        records.MetricComparison, records.TrainingSummary, records.EvaluationSettings, records.ScoreInterval,
        RowScores, Prediction, PredictionMetadata, RunManifest, records.Verdict, records.GateCheck,
    )  # fmt: skip
    for record in documented:
        assert set(record.model_fields) <= named, record
    assert {family.name for family in available()} <= named
    assert {metric.name for metric in reported(available())} <= named
