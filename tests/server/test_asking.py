"""An inconclusive verdict on a real Prefect server: the run waits for a person's decision, or goes on without one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained.registry import promoted_run, write_manifest
from tasks.core.promotion.promotion import current_promotion, promotion_history
from tests.making.evaluation_runs import sums, write_run
from tests.making.model_runs import make_run, manifest_of
from tests.making.warm.python import WarmPython
from tests.server.conftest import ROOT, Server

pytestmark = [pytest.mark.server, pytest.mark.slow]

PATIENCE_SECONDS = 120
PRINTED = "printed.txt"


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A model that answers as well as its base: 40 of 100 rows, others than the base."""
    directory = make_run(tmp_path / "models", "tuned", base=tiny_model_dir)
    write_manifest(directory, manifest_of("tuned", chat_template_sha256="c" * 64))
    base = sums(100, 40)
    tuned = [row.model_copy(update={"predicted_answer": "?"}) for row in sums(100, 0)]
    tuned[20:60] = sums(100, 60)[20:60]
    write_run(tmp_path / "runs" / "base", base)
    write_run(tmp_path / "runs" / "tuned", tuned, model_id=str(directory), adapter=weights_sha256(directory))
    return tmp_path


def start(server: Server, folder: Path, timeout_seconds: int) -> WarmPython:
    """Evaluate in a process of its own, asking a person where the verdict is inconclusive."""
    script = f"""
from flows.evaluation import evaluate
settings = (
    "pipeline.runs_dir={folder / "runs"}", "pipeline.models_dir={folder / "models"}",
    "evaluator.metrics=exact_match", "evaluator.bootstrap_resamples=200",
    "pipeline.promote=ask", "pipeline.ask_timeout_seconds={timeout_seconds}",
)
evaluate(run="tuned", baseline="{folder / "runs" / "base"}", promote=True, settings=settings)
"""
    with Path(os.devnull).open() as nothing, (folder / PRINTED).open("w") as log:
        return WarmPython(
            ["-c", script],
            cwd=folder,
            env={**server.environment, "PYTHONPATH": str(ROOT)},
            streams=(nothing.fileno(), log.fileno(), log.fileno()),
        )


def run_over(server: Server, folder: Path, **state: Any) -> dict[str, Any] | None:
    """The run over this folder; others use the server too."""
    for found in server.post("/flow_runs/filter", flow_runs={"state": state} if state else {}):
        if str(folder) in str(found["parameters"]):
            return dict(found)
    return None


def paused_run(server: Server, folder: Path, process: WarmPython) -> dict[str, Any]:
    """The run that waits for a decision."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if run := run_over(server, folder, type={"any_": ["PAUSED"]}):
            return run
        time.sleep(0.5)
    process.kill()
    pytest.fail(f"no run was paused:\n{(folder / PRINTED).read_text()}")


def ended(server: Server, folder: Path, process: WarmPython, run_id: str) -> tuple[str, str]:
    """How the run ended, and what its process printed."""
    process.wait(PATIENCE_SECONDS)
    output = (folder / PRINTED).read_text()
    assert process.returncode == 0, output
    (run,) = server.post("/flow_runs/filter", flow_runs={"id": {"any_": [run_id]}})
    return run["state"]["type"], output


def test_a_person_promotes_in_the_form_and_the_reason_is_kept(server: Server, folder: Path) -> None:
    process = start(server, folder, timeout_seconds=PATIENCE_SECONDS)
    run = paused_run(server, folder, process)
    answer = {"decision": "promote", "reason": "it answers the new questions"}
    refused = server.post(f"/flow_runs/{run['id']}/resume", run_input={"decision": "promote"})
    assert refused["status"] == "REJECT"  # the reason is missing
    server.post(f"/flow_runs/{run['id']}/resume", run_input=answer)
    assert ended(server, folder, process, run["id"])[0] == "COMPLETED"
    promotion = current_promotion(folder / "models")
    assert promotion is not None and promotion.promoted_by is not None
    assert (promotion.run_name, promotion.forced) == ("tuned", True)
    assert promotion.reason == "it answers the new questions"
    assert f"flow run {run['id']}" in promotion.promoted_by


def test_a_person_who_decides_against_it_leaves_everything_as_it_is(server: Server, folder: Path) -> None:
    process = start(server, folder, timeout_seconds=PATIENCE_SECONDS)
    run = paused_run(server, folder, process)
    answer = {"decision": "do not promote", "reason": "too little data"}
    server.post(f"/flow_runs/{run['id']}/resume", run_input=answer)
    state, output = ended(server, folder, process, run["id"])
    assert state == "COMPLETED"
    assert "a person decided not to promote: too little data" in output
    assert promotion_history(folder / "models") == []


def test_when_nobody_answers_in_time_the_run_ends_well_and_nothing_is_promoted(
    server: Server, folder: Path
) -> None:
    process = start(server, folder, timeout_seconds=3)
    process.wait(PATIENCE_SECONDS)  # its pause may be over before anybody has looked
    run = run_over(server, folder)
    assert run is not None, (folder / PRINTED).read_text()
    state, output = ended(server, folder, process, run["id"])
    assert state == "COMPLETED"
    assert "nobody decided within 3.0 s: it stays inconclusive" in output
    assert promoted_run(folder / "models") is None
