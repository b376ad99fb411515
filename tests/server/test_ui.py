"""The Prefect UI in a real headless Chromium: the form is filled and submitted, the run tells what it did."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not installed"),
]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
RUN_NAME = "from-the-form"


class Ui:
    """What a person does in the UI. With TUNEPROOF_SCREENSHOTS each step leaves a picture in that folder."""

    def __init__(self, driver: Any, server: Server) -> None:
        self.driver, self.server = driver, server
        self._address = server.api_url.removesuffix("/api")
        self._pictures_dir = os.environ.get("TUNEPROOF_SCREENSHOTS")

    def open(self, path: str) -> None:
        self.driver.get(self._address + path)

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def shows(self, *words: str) -> None:
        """Wait until the page shows all these words."""
        wait_until(
            lambda: all(word in self.text() for word in words), lambda: f"{words} not in:\n{self.text()}"
        )

    def field(self, name: str) -> Any:
        """The input of the form below the label that starts with the parameter's name."""
        label = f"//*[starts-with(normalize-space(text()), '{name} (Optional)')]"
        path = f"{label}/following::*[self::input or self::textarea][1]"
        return wait_until(lambda: self.driver.find_elements("xpath", path))[0]

    def fill(self, name: str, value: str) -> None:
        wait_until(lambda: self._typed(name, value), lambda: f"{name} does not take {value}:\n{self.text()}")

    def _typed(self, name: str, value: str) -> bool:
        """Type the value; False when the page, which draws its fields anew while it checks them, lost it."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.common.keys import Keys

        try:
            field = self.field(name)
            field.click()
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(value)
            return bool(self.field(name).get_attribute("value") == value)
        except StaleElementReferenceException:
            return False

    def submit(self) -> None:
        """Submit the form until the page of the run opens: a click while values are being checked does nothing."""
        form = self.driver.current_url
        wait_until(lambda: self._left(form), lambda: f"the form stays:\n{self.text()}")

    def _left(self, address: str, seconds: float = 15) -> bool:
        self.click("Submit")
        deadline = time.monotonic() + seconds
        while self.driver.current_url == address and time.monotonic() < deadline:
            time.sleep(0.2)
        return bool(self.driver.current_url != address)

    def click(self, words: str) -> None:
        path = f"//*[self::button or self::a or @role='tab' or not(*)][normalize-space(.)='{words}']"
        button = wait_until(lambda: self.driver.find_elements("xpath", path))[0]
        self.driver.execute_script("arguments[0].click()", button)  # the page moves while it loads

    def draws_a_picture(self) -> bool:
        drawn = "return [...document.images].some(i => i.src.startsWith('data:') && i.naturalWidth > 500)"
        return bool(self.driver.execute_script(drawn))

    def picture(self, name: str) -> None:
        if self._pictures_dir:
            self.driver.save_screenshot(str(Path(self._pictures_dir) / f"{name}.png"))


@pytest.fixture(scope="module")
def ui(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1400,1500"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM or ""
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield Ui(driver, server)
    driver.quit()


def finish_from_the_form(ui: Ui, server: Server) -> dict[str, Any]:
    """A run that was started from the form of `manual`, after a first try with a bad value."""
    deployment = server.deployments()["manual"]
    ui.open(f"/deployments/deployment/{deployment['id']}/run")
    ui.fill("max_rows", "-3")
    ui.picture("form")
    ui.click("Submit")
    ui.shows("-3 is less than the minimum of 0")
    ui.picture("form-refused")
    assert not [run for run in server.runs_of("manual") if run["parameters"].get("max_rows") == -3]
    ui.fill("max_rows", "4")
    ui.fill("run_name", RUN_NAME)
    ui.submit()
    (run_id,) = wait_until(lambda: started_by_form(server))
    finished = server.wait_for_end(run_id)
    assert finished["state_type"] == "COMPLETED", server.logs(run_id)
    return finished


def started_by_form(server: Server) -> list[str]:
    """Other tests start runs of the same deployment."""
    return [run["id"] for run in server.runs_of("manual") if run["parameters"].get("run_name") == RUN_NAME]


def artifacts_of(server: Server, run_id: str) -> dict[str, dict[str, Any]]:
    """Artifacts of the flow run and its subflows by key."""
    subflows = server.post("/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run_id]}})
    runs = {"flow_run_id": {"any_": [run_id, *(run["id"] for run in subflows)]}}
    found = server.post("/artifacts/filter", artifacts=runs, limit=200)
    return {artifact["key"]: artifact for artifact in found}


def it_has_its_values_and_is_named_after_its_verdict(finished_run: dict[str, Any], server: Server) -> None:
    assert finished_run["parameters"]["max_rows"] == 4
    assert finished_run["name"] == f"finetune-infer-evaluate · {RUN_NAME} · inconclusive"
    chosen = {"parent_flow_run_id": {"any_": [finished_run["id"]]}}
    names = {run["name"] for run in server.post("/flow_runs/filter", flow_runs=chosen)}
    assert f"finetune · {RUN_NAME} · 6 rows" in names
    assert f"infer · {RUN_NAME} · questions · 4 rows" in names
    assert f"evaluate · {RUN_NAME}-questions · inconclusive" in names


def the_run_page_shows_its_parts(finished_run: dict[str, Any], ui: Ui) -> None:
    ui.open(f"/runs/flow-run/{finished_run['id']}")
    ui.click("Subflow Runs")
    ui.shows("Completed", f"finetune · {RUN_NAME} · 6 rows")
    ui.picture("run")


def artifacts_tell_the_verdict_the_scores_the_lineage_and_the_loss(
    finished_run: dict[str, Any], ui: Ui, server: Server
) -> None:
    artifacts = artifacts_of(server, finished_run["id"])
    pages = {
        f"verdict-{RUN_NAME}-questions": ("Inconclusive", "Checks", "undecided"),
        f"scores-{RUN_NAME}-questions": ("metric", "before", "after", "Exact match"),
        f"lineage-{RUN_NAME}-questions": ("training data", "weights", "report.html"),
        f"loss-plot-{RUN_NAME}": ("Training losses",),
        f"sample-{RUN_NAME}-questions": ("How many legs have 3 dogs?",),
        f"generation-{RUN_NAME}-questions": ("100%",),
    }
    for key, words in pages.items():
        ui.open(f"/artifacts/artifact/{artifacts[key]['id']}")
        ui.shows(*words)
        ui.picture(key)
    for key in (f"lineage-{RUN_NAME}-questions", f"loss-plot-{RUN_NAME}"):
        ui.open(f"/artifacts/artifact/{artifacts[key]['id']}")
        wait_until(ui.draws_a_picture)


def each_step_logs_one_line_without_a_traceback_or_a_bar(
    finished_run: dict[str, Any], server: Server
) -> None:
    chosen = {"parent_flow_run_id": {"any_": [finished_run["id"]]}}
    for run in server.post("/flow_runs/filter", flow_runs=chosen):
        lines = wait_until(partial(server.logs, run["id"])).splitlines()  # sent a while later
        assert 0 < len(lines) < 40, "\n".join(lines)
        assert all(len(line) < 400 for line in lines), max(lines, key=len)
        assert not any(word in line for line in lines for word in ("Traceback", "it/s]", "Warning:"))


def test_a_run_is_started_from_the_form_and_tells_its_verdict_on_its_pages(ui: Ui, server: Server) -> None:
    # One story, one test: workers that shared it out would each start a run of their own.
    finished_run = finish_from_the_form(ui, server)
    it_has_its_values_and_is_named_after_its_verdict(finished_run, server)
    the_run_page_shows_its_parts(finished_run, ui)
    artifacts_tell_the_verdict_the_scores_the_lineage_and_the_loss(finished_run, ui, server)
    each_step_logs_one_line_without_a_traceback_or_a_bar(finished_run, server)
