"""The report in a real headless Chromium: search, filter, sort, open, keys, widths; no error, no request."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.evaluation.outputs import EvaluationFiles, write_summary
from tasks.core.report.leaderboard import read_leaderboard
from tasks.core.report.leaderboard_page import write_leaderboard
from tasks.core.report.writing import report_run
from tests.making.evaluation_runs import decided, evaluate_run, row, sums, training, write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not installed"),
]

HOSTILE = "</script><script>document.title='taken over'</script><img src=http://192.0.2.1/x onerror=alert(1)>"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with a fresh profile and logs of console and network."""
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


def make_report(root: Path, count: int) -> Path:
    """Row 1 hostile, 2 a regression, 3 an error, 4 cut, 5 a megabyte, the rest half gains, half ties."""

    def answer(i: int, tuned: bool) -> str:
        if i == 0:
            return HOSTILE
        if i == 1:
            return "wrong now" if tuned else "2"
        if i == 4:
            return "z" * 1_000_000 if tuned else ""
        return str(2 * i) if tuned and i % 2 else f"The answer might be {3 * i + 1}, or {2 * i} or so"

    def prediction(i: int, tuned: bool) -> Any:
        if i == 2 and tuned:
            return row(i, "", "4", error="Out of memory: one row did not fit")
        return row(i, answer(i, tuned), str(2 * i), finish_reason="length" if i == 3 else "stop")

    tuned = write_run(root / "tuned", [prediction(i, True) for i in range(count)])
    base = write_run(root / "base", [prediction(i, False) for i in range(count)])
    settings = EvaluatorConfig(metrics=("exact_match", "f1"), bootstrap_resamples=200)
    evaluate_run(tuned, base, settings, training(root / "model"))
    return tuned / "report.html"


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 1,000 rows."""
    return make_report(tmp_path_factory.mktemp("runs"), 1000)


class Page:
    """What a reader does with the report."""

    def __init__(self, driver: Any, path: Path, counted: str = "#row-count") -> None:
        self.driver = driver
        self._counted = counted
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(path.as_uri())
        self.until(lambda: self.text(counted) and "Reading" not in self.text(counted))

    def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"never came true; {self.text(self._counted)}"
            time.sleep(0.05)

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        return list(
            self.js("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector)
        )

    def choose(self, selector: str, value: str) -> None:
        self.js(
            "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('change'))",
            selector,
            value,
        )

    def search(self, words: str) -> None:
        field = self.driver.find_element("css selector", "#search")
        field.clear()
        field.send_keys(words)

    def keys(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def numbers(self) -> list[int]:
        return [int(text) for text in self.texts("tr.row .opener")]

    def console(self) -> list[str]:
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in {"SEVERE", "WARNING"}
        ]

    def requests(self) -> list[str]:
        """What was asked for, but by the page that the browser opens before ours and may still be loading."""
        import json

        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome:")]
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


@pytest.fixture
def page(browser: Any, report_path: Path) -> Iterator[Page]:
    """The opened report; afterwards there was no console message and no request."""
    opened = Page(browser, report_path)
    yield opened
    assert opened.console() == []
    assert opened.requests() == []


def test_the_report_opens_with_its_answer_its_charts_and_its_first_page(page: Page) -> None:
    assert page.text("h1") == "The candidate is better than its baseline."
    assert page.text("#row-count") == "1,000 rows"
    assert page.numbers() == list(range(1, 26))
    for chart in ("#chart-scores", "#chart-change", "#chart-loss"):
        assert page.js("return document.querySelectorAll(arguments[0] + ' svg').length", chart) >= 1


def test_hostile_rows_are_text(page: Page) -> None:
    page.js("document.querySelector('.opener').click()")
    assert HOSTILE in page.texts(".detail .text")
    assert page.driver.title == "tuned · evaluation"
    assert page.js("return document.querySelectorAll('#rows img, #rows script').length") == 0


def test_search_finds_words_of_answers_and_says_how_many(page: Page) -> None:
    page.search("taken OVER")
    page.until(lambda: page.text("#row-count") == "1 of 1,000 rows")
    assert page.numbers() == [1]
    page.search("no such words anywhere")
    page.until(lambda: page.text("#row-count") == "0 of 1,000 rows")
    assert "No row fits" in page.text("#row-table")


def test_filters_show_regressions_gains_errors_and_cut_answers(page: Page) -> None:
    page.choose("#filter", "worse")
    assert page.numbers() == [2]
    page.choose("#filter", "errors")
    assert page.numbers() == [3]
    page.choose("#filter", "cut")
    assert page.numbers() == [4]
    page.choose("#filter", "better")
    assert page.text("#row-count") == "499 of 1,000 rows"
    assert set(page.texts("tr.row .change")) == {"+100.0"}


def test_sorting_by_a_heading_turns_with_each_click_and_is_announced(page: Page) -> None:
    page.choose("#row-metric", "f1")
    for order in ("descending", "ascending"):
        page.js("document.querySelector('[data-sort=change]').click()")
        assert page.js("return document.querySelector('[data-sort=change]').closest('th').ariaSort") == order
        shown = [
            float(text.replace("\N{MINUS SIGN}", "-").replace("+", ""))
            for text in page.texts("tr.row .change")
        ]
        assert shown == sorted(shown, reverse=order == "descending")
        assert len(set(shown)) >= 1 and shown[0] != 0


def test_pages_turn_and_their_size_can_be_chosen(page: Page) -> None:
    page.js("document.querySelector('#next').click()")
    assert page.numbers() == list(range(26, 51))
    assert page.text("#page") == "Page 2 of 40"
    page.choose("#page-size", "100")
    assert len(page.numbers()) == 100


def test_an_opened_row_shows_both_answers_with_differences_marked(page: Page) -> None:
    page.search("0007-0")
    page.until(lambda: page.numbers() == [8])
    page.js("document.querySelector('.opener').click()")
    assert page.texts(".detail .pane h3")[:4] == ["Question", "Reference", "Before9 tokens", "After1 tokens"]
    assert "".join(page.texts(".detail del")).strip() != ""
    page.choose(".detail select", "reference")
    assert page.texts(".detail del") == []
    page.choose(".detail select", "off")
    assert page.texts(".detail ins") == []
    assert page.texts(".detail-scores tbody th") == ["Exact match", "F1"]


def test_the_table_can_be_used_by_keyboard_alone(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.keys("/")
    assert page.js("return document.activeElement.id") == "search"
    page.keys("taken", Keys.ESCAPE)
    page.until(lambda: page.text("#row-count") == "1,000 rows")
    page.js("document.querySelector('.opener').focus()")
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    assert page.js("return document.activeElement.textContent") == "3"
    assert page.js("return document.activeElement.ariaExpanded") == "true"
    assert "Error: Out of memory: one row did not fit" in page.texts(".detail .text")
    page.keys(Keys.ESCAPE)
    assert page.js("return document.querySelectorAll('.detail').length") == 0
    page.keys(Keys.ARROW_RIGHT)
    assert page.numbers()[0] == 26
    page.keys(Keys.ARROW_LEFT)
    assert page.numbers()[0] == 1


def test_a_megabyte_answer_opens_cut_and_marked(page: Page) -> None:
    page.js("document.querySelectorAll('.opener')[4].click()")
    assert any(text.endswith("[980,000 more characters]") for text in page.texts(".detail .text"))


def test_the_page_fits_a_phone_in_light_and_dark(page: Page) -> None:
    try:
        for scheme in ("light", "dark"):
            page.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            page.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
            )
            page.until(lambda: page.js("return document.documentElement.scrollWidth") <= 390)
            page.js("document.querySelector('.opener').click()")
            assert page.js("return document.documentElement.scrollWidth") <= 390
            background = page.js("return getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(251, 251, 250)" if scheme == "light" else "rgb(20, 22, 26)")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_colours_can_be_chosen_against_the_system(page: Page) -> None:
    for expected in ("light", "dark", "system"):
        page.js("document.querySelector('#theme').click()")
        assert page.js("return document.documentElement.dataset.theme") == expected


@pytest.mark.parametrize("count", [10, 10_000])
def test_small_and_large_reports_can_be_searched(browser: Any, tmp_path: Path, count: int) -> None:
    page = Page(browser, make_report(tmp_path, count))
    assert page.text("#row-count") == f"{count:,} rows"
    page.search("taken over")
    page.until(lambda: page.text("#row-count") == f"1 of {count:,} rows")
    page.keys("\ue00c")  # Escape clears the search
    page.choose("#filter", "worse")
    page.until(lambda: page.text("#row-count") == f"1 of {count:,} rows")
    page.js("document.querySelector('.opener').click()")
    assert len(page.texts(".detail")) == 1
    assert page.console() == []
    assert page.requests() == []


@pytest.fixture(scope="module")
def decided_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a verdict and a champion, and beside it the leaderboard of its runs."""
    root = tmp_path_factory.mktemp("decided")
    settings = EvaluatorConfig(metrics=("exact_match", "f1", "rouge_score"), bootstrap_resamples=200)
    tuned = write_run(root / "tuned", sums(40, 30), finished_at="2026-01-02T00:00:00+00:00")
    base, champion = write_run(root / "base", sums(40, 5)), write_run(root / "champion", sums(40, 20))
    write_run(root / "elsewhere", sums(10, 10), rows_sha256="e" * 64)
    against_base = evaluate_run(tuned, base, settings)
    summary = decided(against_base, evaluate_run(tuned, champion, settings), "promote")
    write_summary(EvaluationFiles(tuned).summary_path, summary)
    write_leaderboard(root / "leaderboard.html", read_leaderboard(root, root), runs_dir=root)
    return report_run(tuned).report_path


def test_a_verdict_unfolds_to_its_checks_and_fits_a_phone(browser: Any, decided_path: Path) -> None:
    page = Page(browser, decided_path)
    assert page.text("h1") == "Promote"
    assert not page.js("return document.querySelector('.checks').open")
    page.driver.find_element("css selector", ".checks summary").click()
    assert page.js("return document.querySelector('.checks ul').checkVisibility()")
    assert page.texts(".checks .outcome") == ["passed", "failed", "skipped"]
    assert page.js("return document.querySelectorAll('.scores circle.champion').length") == 5
    try:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
        )
        page.until(lambda: page.js("return document.documentElement.scrollWidth") <= 390)
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert (page.console(), page.requests()) == ([], [])


def test_the_leaderboard_sorts_searches_filters_and_shows_other_metrics(
    browser: Any, decided_path: Path
) -> None:
    page = Page(browser, decided_path.parent.parent / "leaderboard.html", "#run-count")

    def names() -> list[str]:
        return page.texts("section.group:not([hidden]) th[scope=row]")

    assert page.text("#run-count") == "4 runs"
    assert names() == ["tuned", "champion", "base", "elsewhere"]
    heading = "document.querySelector('[data-sort=\"metric:exact_match\"]')"
    assert page.js(f"return {heading}.closest('th').ariaSort") == "descending"
    page.js(f"{heading}.click()")
    assert page.js(f"return {heading}.closest('th').ariaSort") == "ascending"
    assert names()[:3] == ["base", "champion", "tuned"]
    assert "ROUGE-2" not in " ".join(page.texts("thead th"))
    page.driver.find_element("css selector", ".chooser summary").click()
    page.driver.find_elements("css selector", ".choices input")[3].click()
    assert "ROUGE-2" in " ".join(page.texts("thead th"))
    page.search("elsew")
    page.until(lambda: names() == ["elsewhere"])
    page.keys("\ue00c")  # Escape clears the search
    page.choose("#verdict", "promote")
    page.until(lambda: names() == ["tuned"])
    page.driver.find_element("css selector", "th[scope=row] a").click()
    page.until(lambda: page.text("h1") == "Promote")
    assert (page.console(), page.requests()) == ([], [])
