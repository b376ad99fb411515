"""A Prefect server that hangs, is killed or comes back: the work goes on, and ends as it would without Prefect."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.making.warm.python import WarmPython
from tests.server.conftest import ROOT, Server, wait_until, write_questions
from tests.server.wire import Wire, wire_to

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROWS = 16
# Answers one at a time that take a while: the server goes away in the middle of them.
SLOWLY = {
    "inferencer.batch-size": "1", "inferencer.max-new-tokens": "80", "inferencer.min-new-tokens": "80",
    "inferencer.temperature": "0", "inferencer.device": "cpu", "inferencer.score-references": "false",
    "gate.noise-rows": "0", "evaluator.metrics": "exact_match",
}  # fmt: skip


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with wire_to(server.api_url) as wire:
        yield wire


class Command:
    """`tuneproof` at work in a folder of its own, with the server at the other end of a wire."""

    def __init__(
        self, server: Server, wire: Wire, folder: Path, model_dir: Path, *command: str, **more: str
    ) -> None:
        self.folder = folder
        questions = write_questions(folder / "test.jsonl", ROWS)
        settings = {
            **SLOWLY,
            "inferencer.model": str(model_dir),
            "inferencer.testing-data-id": str(questions),
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        self._log = (folder / "printed.txt").open("w")
        with Path(os.devnull).open() as nothing:
            self.process = WarmPython(
                ["-m", "flows", *command, *options],
                cwd=folder,
                env={**server.environment, "PREFECT_API_URL": wire.api_url, "PYTHONPATH": str(ROOT), **more},
                streams=(nothing.fileno(), self._log.fileno(), self._log.fileno()),
            )

    def answered(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("runs/*/ledger.jsonl"))

    def wait_for_rows(self, count: int) -> None:
        wait_until(
            lambda: self.answered() >= count or self.process.poll() is not None,
            self.printed,
            every_seconds=0.05,
        )
        assert self.answered() >= count, self.printed()

    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text()

    def end(self, timeout_seconds: float) -> str:
        """What it printed, when it has ended well."""
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end:\n{self.printed()}")
        finally:
            self.process.kill()
            self._log.close()
        assert self.process.returncode == 0, self.printed()
        assert "Traceback" not in self.printed()
        return self.printed()

    def scored(self) -> bool:
        return bool(list(self.folder.glob("runs/*/evaluator_output_summary.json")))


def test_a_server_that_hangs_costs_no_row_and_is_told_the_end_of_phase_and_pipeline_when_it_is_back(
    server: Server, wire: Wire, tmp_path: Path, tiny_model_dir: Path
) -> None:
    command = Command(server, wire, tmp_path, tiny_model_dir, "pipeline", "--skip-finetuning")
    command.wait_for_rows(2)
    wire.hang()
    command.wait_for_rows(ROWS)
    wait_until(lambda: "waiting up to" in command.printed(), command.printed)
    assert command.scored()  # the next phase did not wait either
    wire.mend("hang")
    assert "not told" not in command.end(60)
    named = {"name": {"like_": tiny_model_dir.name}}  # as runs of other tests are, which may go on
    found = server.post("/flow_runs/filter", flow_runs=named, sort="START_TIME_DESC")
    own = [run for run in found if str(tmp_path) in json.dumps(run["parameters"])]
    (phase,) = (run for run in own if run["name"].startswith("infer ·") and f"{ROWS} rows" in run["name"])
    assert phase["state_type"] == "COMPLETED", command.printed()
    tracked = server.post("/task_runs/filter", task_runs={"id": {"any_": [phase["parent_task_run_id"]]}})
    assert server.run(tracked[0]["flow_run_id"])["state_type"] == "COMPLETED"
    shown = server.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [phase["id"]]}})
    assert [float(one["data"]) for one in shown if one["type"] == "progress"] == [100.0]


def test_a_server_that_was_killed_and_started_again_is_told_how_the_run_ended(
    server: Server, wire: Wire, tmp_path: Path, tiny_model_dir: Path
) -> None:
    command = Command(
        server, wire, tmp_path, tiny_model_dir, "infer", "--inferencer.run-name", "killed-and-back"
    )
    command.wait_for_rows(2)
    wire.refuse()
    command.wait_for_rows(ROWS)
    wait_until(lambda: "waiting up to" in command.printed(), command.printed)
    wire.mend("refuse")
    command.end(60)
    shown = server.post("/artifacts/filter", artifacts={"key": {"any_": ["generation-killed-and-back"]}})
    assert [float(one["data"]) for one in shown] == [100.0]
    assert server.run(shown[0]["flow_run_id"])["state_type"] == "COMPLETED"


def test_a_server_that_stays_away_is_waited_for_in_bounds_and_one_line_tells_what_it_was_not_told(
    server: Server, wire: Wire, tmp_path: Path, tiny_model_dir: Path
) -> None:
    patience = {"TUNEPROOF_PREFECT_PATIENCE_SECONDS": "1"}
    command = Command(server, wire, tmp_path, tiny_model_dir, "infer", **patience)
    command.wait_for_rows(2)
    wire.refuse()
    command.wait_for_rows(ROWS)
    began = time.monotonic()
    lines = command.end(60).splitlines()
    assert time.monotonic() - began < 40  # on a busy machine; Prefect alone takes minutes
    told = [line for line in lines if line.startswith(("warning:", "error:"))]
    assert len(told) == 2 and "waiting up to 1 s" in told[0]
    assert "was not told how infer ended" in told[1]
    (manifest,) = tmp_path.glob("runs/*/manifest.json")
    assert json.loads(manifest.read_bytes())["row_count"] == ROWS


def test_a_server_that_hangs_at_the_start_is_told_as_a_mistake_of_the_settings(
    server: Server, wire: Wire, tmp_path: Path, tiny_model_dir: Path
) -> None:
    wire.hang()
    command = Command(server, wire, tmp_path, tiny_model_dir, "infer", TUNEPROOF_PREFECT_PATIENCE_SECONDS="1")
    assert command.process.wait(60) == 1
    assert f"error: Prefect's server at {wire.api_url} does not answer" in command.printed()
    assert "Traceback" not in command.printed() and not (tmp_path / "runs").exists()
