"""Deployments at work on a real server with a real worker: by form, by event, killed, cancelled, retried."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import psutil
import pytest

from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import read_sessions
from tests.making.warm.python import WarmPython, run_python
from tests.server.conftest import ROOT, SETUP, Server, wait_until, write_questions

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROWS = 16
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
# Long answers one at a time, in a child process as deployments do by default: slow enough to be interrupted.
SLOWLY = ["inferencer.batch_size=1", "inferencer.max_new_tokens=300", "inferencer.min_new_tokens=300"]
SLOWLY += ["inferencer.isolation=process", "inferencer.score_references=false"]


def ledger_ids(run: RunDir) -> list[str]:
    """Ids of the rows that are answered, in the order of their ends."""
    if not run.ledger_path.exists():
        return []
    lines = run.ledger_path.read_text().splitlines(keepends=True)
    return [json.loads(line)["id"] for line in lines if line.endswith("\n")]


def flow_process(run_id: str) -> psutil.Process:
    """The process that the worker started for a run; its children are not named after it."""

    def find() -> psutil.Process | None:
        for process in psutil.process_iter():
            try:
                of_run = process.environ().get("PREFECT__FLOW_RUN_ID") == run_id
                if of_run and "prefect.engine" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        return None

    found: psutil.Process = wait_until(find)
    return found


# By form


def test_manual_runs_the_whole_job_with_the_parameters_of_the_form(server: Server) -> None:
    run_id = server.start("manual", cold=True, run_name="by-hand", max_rows=3)
    ended = server.wait_for_end(run_id)
    assert ended["state_type"] == "COMPLETED", server.logs(run_id)
    assert "by-hand" in ended["name"]
    phases = server.post("/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run_id]}})
    assert phases and all("tuneproof" in phase["tags"] for phase in phases)
    model = server.home / "models" / "by-hand"
    assert (model / "tuneproof_manifest.json").is_file()
    [candidate] = [
        RunDir(path) for path in server.runs_dir.iterdir() if (path / "evaluator_output_summary.json").exists()
        and RunDir(path).read_manifest().identity.model.model_id == str(model)
    ]  # fmt: skip
    assert candidate.read_manifest().row_count == 3
    assert (candidate.path / "report.html").is_file()


# By event


def emit(
    server: Server,
    event: str,
    resource_id: str,
    *,
    payload: dict[str, str],
    labels: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Send an event as docs/trigger-from-my-training.md does with curl."""
    resource = {"prefect.resource.id": resource_id, **labels}
    occurred = datetime.now(UTC).isoformat()
    sent = {"id": str(uuid.uuid4()), "occurred": occurred, "event": event, "resource": resource}
    server.post("/events", [{**sent, "payload": payload}])


def emit_trained(server: Server, model_name: str, model_dir: Path) -> None:
    """What any training job does when it is done."""
    payload = {"model_dir": str(model_dir)}
    emit(server, "tuneproof.model.trained", f"tuneproof.model.{model_name}", payload=payload)


@pytest.fixture
def events_start_runs(server: Server) -> Iterator[None]:
    server.let_events_start_runs(True)
    yield
    server.let_events_start_runs(False)


@pytest.mark.usefixtures("events_start_runs")
def test_a_training_whose_event_is_sent_twice_starts_one_inference_whose_event_starts_one_evaluation_of_its_run(
    server: Server,
) -> None:
    trained = server.tuneproof("finetune", str(server.config_path), "--fine-tuner.run-name", "mine")
    assert trained.returncode == 0, trained.stderr
    model_dir = server.home / "models" / "mine"
    emit_trained(server, "mine", model_dir)

    def is_of_mine(run: dict[str, Any]) -> bool:
        """Other tests at this server train and answer too."""
        told = run["parameters"]
        return "mine" in Path(told.get("model") or told.get("run") or "").name

    def ended(deployment: str) -> list[dict[str, Any]]:
        runs = [run for run in server.runs_of(deployment) if is_of_mine(run)]
        return runs if all(run["state_type"] in ENDS for run in runs) else []

    [evaluation] = wait_until(lambda: ended("evaluate-after-inference"), every_seconds=0.5)
    [inference] = wait_until(lambda: ended("infer-after-training"))
    for run in (inference, evaluation):
        assert (run["state_type"], run["created_by"]["type"]) == ("COMPLETED", "AUTOMATION")

    folder = RunDir(Path(evaluation["parameters"]["run"]))
    manifest = folder.read_manifest()
    assert inference["parameters"]["model"] == manifest.identity.model.model_id == str(model_dir)
    summary = json.loads((folder.path / "evaluator_output_summary.json").read_text())
    assert summary["candidate"]["run_key"] == manifest.run_key
    assert summary["candidate"]["predictions_sha256"] == manifest.predictions_sha256
    chosen = {"resource": {"id": [f"tuneproof.evaluation.{manifest.run_name}"]}}
    told = wait_until(lambda: server.post("/events/filter", filter=chosen)["events"])  # written in batches
    assert {event["payload"]["run_key"] for event in told} == {manifest.run_key}


# Interrupted


def intrude(run_path: Path) -> str:
    """What another process hears that wants to write into the folder."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom tasks.core.errors import RunLockedError\n"
        "from tasks.core.runs.run_dir import RunDir\n"
        "try:\n    RunDir(Path(sys.argv[1])).locked().__enter__()\n"
        "except RunLockedError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return run_python(["-c", script, str(run_path)], cwd=ROOT, env=environment, check=True).stdout


def has_let_go(server: Server, run_id: str, *, since: datetime) -> bool:
    """Whether the worker is done with the run's last attempt; before that it reports the death once more.

    That report would overwrite a retry. The event that follows it is the last word.
    """
    chosen = {
        "event": {"name": ["prefect.worker.executed-flow-run"]},
        "related": {"id": [f"prefect.flow-run.{run_id}"]},
        "occurred": {"since": since.isoformat()},
    }
    return bool(server.post("/events/filter", filter=chosen)["events"])


def test_a_run_that_is_cancelled_and_then_killed_resumes_both_times_and_answers_no_row_twice(
    server: Server, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path / "cats.jsonl", ROWS, "cats")
    parameters: dict[str, Any] = {
        "dataset": str(questions), "run_name": "interrupted", "settings": SLOWLY
    }  # fmt: skip
    run_id, run = server.start("infer-new-data", **parameters), RunDir(server.runs_dir / "interrupted")
    wait_until(lambda: len(ledger_ids(run)) >= 2, lambda: server.logs(run_id))

    refusal = intrude(run.path)
    assert "is being written by process" in refusal
    assert "next: wait for it to end" in refusal

    process = flow_process(run_id)
    family = [process, *process.children(recursive=True)]
    asked = time.monotonic()
    server.set_state(run_id, type="CANCELLING")
    _, left = psutil.wait_procs(family, timeout=60)
    cancel_seconds = time.monotonic() - asked
    assert not left
    assert cancel_seconds < 25  # before the worker would kill it
    assert server.wait_for_end(run_id)["state_type"] == "CANCELLED"
    at_cancel = ledger_ids(run)

    server.retry(run_id)
    wait_until(lambda: len(ledger_ids(run)) >= len(at_cancel) + 2, lambda: server.logs(run_id))
    process = flow_process(run_id)
    family = process.children(recursive=True)
    killed_at = datetime.now(UTC)
    process.kill()
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left
    at_kill = ledger_ids(run)
    assert server.wait_for_end(run_id)["state_type"] == "CRASHED"
    wait_until(lambda: has_let_go(server, run_id, since=killed_at))

    server.retry(run_id)
    assert server.wait_for_end(run_id)["state_type"] == "COMPLETED", server.logs(run_id)
    manifest, ids = run.read_manifest(), ledger_ids(run)
    assert (manifest.row_count, manifest.error_count) == (ROWS, 0)
    assert len(ids) == len(set(ids)) == ROWS
    assert at_kill[: len(at_cancel)] == at_cancel
    assert ids[: len(at_kill)] == at_kill
    assert read_sessions(run)[-1].rows == ROWS - len(at_kill)


# Silent


@contextmanager
def executed_without_worker(server: Server, run_id: str) -> Iterator[WarmPython]:
    """Execute a run as a worker's child would, with no worker to notice its death."""
    environment = {
        **server.environment,
        "PREFECT__FLOW_RUN_ID": run_id,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
    }
    with Path(os.devnull).open("r+") as nothing:
        process = WarmPython(
            ["-m", "prefect.engine"], cwd=ROOT, env=environment, streams=(nothing.fileno(),) * 3,
            new_session=True, warm_children=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_run_that_died_with_its_worker_is_marked_by_its_missing_heartbeat_and_resumes(
    server: Server, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path / "birds.jsonl", 6, "birds")
    path = f"/deployments/{server.deployments()['infer-new-data']['id']}/create_flow_run"
    parameters = {"dataset": str(questions), "run_name": "silent", "settings": SLOWLY}
    # Pending runs are left alone by workers.
    run_id = server.post(path, parameters=parameters, state={"type": "PENDING"})["id"]
    run = RunDir(server.runs_dir / "silent")
    with executed_without_worker(server, run_id) as process:
        wait_until(lambda: len(ledger_ids(run)) >= 2, lambda: server.logs(run_id))
        process.kill()
        process.wait()
    answered = ledger_ids(run)
    assert server.run(run_id)["state_type"] == "RUNNING"
    crashed = server.wait_for_end(run_id)
    assert crashed["state_type"] == "CRASHED"
    assert "No sign of life" in crashed["state"]["message"]
    server.retry(run_id)
    assert server.wait_for_end(run_id)["state_type"] == "COMPLETED"
    assert ledger_ids(run)[: len(answered)] == answered
    assert run.read_manifest().row_count == 6


# Told


class Listener(BaseHTTPRequestHandler):
    """Takes what a notification block of the type custom webhook sends."""

    heard: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.heard.append(self.rfile.read(length).decode())
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def webhook_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}/"
        listener.shutdown()


def test_notifications_are_off_until_a_block_is_named_and_then_tell_of_rejected_models_and_once_of_a_dead_run(
    server: Server, webhook_url: str
) -> None:
    assert not any("notify" in found["name"] for found in server.post("/automations/filter"))
    refused = server.tuneproof("setup", "--notify-block", "custom-webhook/team", *SETUP)
    assert refused.returncode == 2
    assert "there is no notification block 'custom-webhook/team'" in refused.stderr

    script = (
        "import sys\nfrom prefect.blocks.notifications import CustomWebhookNotificationBlock as Block\n"
        "fields = {'text': '{{subject}} | {{body}}'}\n"
        "Block(name='team', url=sys.argv[1], json_data=fields).save('team')"
    )
    run_python(["-c", script, webhook_url], env=server.environment, check=True)
    named = server.tuneproof("setup", "--notify-block", "custom-webhook/team", *SETUP)
    assert named.returncode == 0, named.stderr

    def finish_evaluation(name: str, decision: str) -> None:
        emit(
            server,
            "tuneproof.evaluation.finished",
            f"tuneproof.evaluation.{name}",
            labels={"tuneproof.verdict": decision},
            payload={"run_name": name, "run_dir": f"/runs/{name}", "answer": f"It got {name}."},
        )

    finish_evaluation("better", "promote")
    finish_evaluation("worse", "reject")
    crashed = {"state": {"type": "CRASHED", "message": "The machine is gone."}, "force": True}
    path = f"/deployments/{server.deployments()['infer-new-data']['id']}/create_flow_run"
    run_id = server.post(path, state={"type": "PENDING"})["id"]
    for _ in range(2):
        server.post(f"/flow_runs/{run_id}/set_state", crashed)
    told = wait_until(lambda: [text for text in Listener.heard if "worse" in text])
    assert "worse was rejected" in told[0]
    assert "It got worse." in told[0]
    assert not any("better" in text for text in Listener.heard)
    assert len(wait_until(lambda: [text for text in Listener.heard if "machine is gone" in text])) == 1
    finish_evaluation(
        "last", "reject"
    )  # events are told in their order: a second telling would have come before
    wait_until(lambda: any("last was rejected" in text for text in Listener.heard))
    assert sum("machine is gone" in text for text in Listener.heard) == 1
