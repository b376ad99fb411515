"""A real Prefect server and process worker, started by `tuneproof up` on a port of their own with an empty database.

Test processes that run side by side share them: the first one starts them, the last one ends them.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock

from flows.server.server_place import ServerPlace
from flows.server.serving import marked
from tests.making.prefect_api import give_database
from tests.making.warm.descendants import COLD
from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_SECONDS = 240
# As soon as Prefect's shortest interval of heartbeats, 30 s, allows.
SETUP = ("--crashed-after-seconds", "40")


@dataclass(frozen=True)
class Server:
    """A running server and worker: the API, the environment of processes that use it, the deployments' files."""

    api_url: str
    environment: dict[str, str]
    home: Path
    config_path: Path

    @property
    def runs_dir(self) -> Path:
        return self.home / "runs"

    def command(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run `python -m …` against this server, as a person would in the checkout."""
        return run_python(["-m", *arguments], cwd=cwd, env={**self.environment, "PWD": str(cwd)})

    def prefect(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return self.command("prefect", *arguments, cwd=cwd)

    def tuneproof(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.command("flows.cli", *arguments)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The API's answer; a busy database (503) is asked again, as Prefect's own client does."""

        def answered() -> httpx.Response | None:
            found = _client().request(method, f"{self.api_url}{path}", json=body)
            return None if found.status_code == httpx.codes.SERVICE_UNAVAILABLE else found

        response = wait_until(answered)
        response.raise_for_status()
        return response.json() if response.content else None

    def post(self, path: str, body: Any = None, **fields: Any) -> Any:
        return self.ask("POST", path, fields if body is None else body)

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {found["name"]: found for found in self.post("/deployments/filter")}

    def start(self, deployment: str, *, cold: bool = False, **parameters: Any) -> str:
        """Start a run of a deployment, as the form in the UI does; gives its id.

        All processes of a cold one are new interpreters, as people have them.
        """
        path = f"/deployments/{self.deployments()[deployment]['id']}/create_flow_run"
        variables = {"env": {COLD: "1"}} if cold else {}
        state = {"type": "SCHEDULED"}
        return str(self.post(path, parameters=parameters, state=state, job_variables=variables)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run_id}")
        return found

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        """All runs of a deployment, newest first."""
        chosen = {"name": {"any_": [deployment]}}
        found: list[dict[str, Any]] = self.post(
            "/flow_runs/filter", deployments=chosen, sort="EXPECTED_START_TIME_DESC"
        )
        return found

    def events_start_runs(self) -> bool:
        """Whether the end of a training or an inference starts the next deployment, as it is deployed."""
        return all(found["enabled"] for found in self._starting_by_event())

    def let_events_start_runs(self, wanted: bool) -> None:
        for found in self._starting_by_event():
            self.ask("PATCH", f"/automations/{found['id']}", {"enabled": wanted})

    def _starting_by_event(self) -> list[dict[str, Any]]:
        names = ("tuneproof-infer-after-training", "tuneproof-evaluate-after-inference")
        found = [found for found in self.post("/automations/filter") if found["name"] in names]
        assert len(found) == len(names)
        return found

    def set_state(self, run_id: str, **state: str) -> None:
        """What the buttons Cancel and Retry in the UI do."""
        self.post(f"/flow_runs/{run_id}/set_state", state=state)

    def retry(self, run_id: str) -> None:
        self.set_state(run_id, type="SCHEDULED", name="AwaitingRetry")

    def wait_for_end(self, run_id: str) -> dict[str, Any]:
        """The run when it is in a final state."""
        ends = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        wait_until(
            lambda: self.run(run_id)["state_type"] in ends, lambda: self.logs(run_id), every_seconds=0.5
        )
        return self.run(run_id)

    def logs(self, run_id: str) -> str:
        found = self.post("/logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, sort="TIMESTAMP_ASC")
        return "\n".join(log["message"] for log in found)


@functools.cache
def _client() -> httpx.Client:
    """One for all requests: each client reads all certificates when it is made."""
    return httpx.Client(timeout=PATIENCE_SECONDS)


def wait_until(
    condition: Callable[[], Any], explain: Callable[[], str] = lambda: "", *, every_seconds: float = 0.2
) -> Any:
    """What the condition gives as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(every_seconds)
    pytest.fail(f"waited {PATIENCE_SECONDS} s in vain. {explain()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(home: Path) -> dict[str, str]:
    """The environment without a person's own servers and settings."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TUNEPROOF_"))
    }
    return {
        **kept,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Server]:
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home = shared / "prefect"
    lock, users_path = FileLock(shared / "server.lock"), shared / "server-users.json"
    with lock:
        users: dict[str, Any] = json.loads(users_path.read_text()) if users_path.exists() else {"count": 0}
        if users["count"] == 0:
            users["api_url"] = _start(home, tiny_model_dir)
            deployed = Server(users["api_url"], {}, home, home / "settings.toml")
            assert deployed.events_start_runs()
            # Most tests that infer do not look at the evaluation that this would start.
            deployed.let_events_start_runs(False)
        _write(users_path, users, by=1)
    api_url = users["api_url"]
    try:
        environment = {**clean_environment(home), "PREFECT_API_URL": api_url}
        yield Server(api_url, environment, home, home / "settings.toml")
    finally:
        with lock:
            users = json.loads(users_path.read_text())
            _write(users_path, users, by=-1)
            if users["count"] == 0:
                down = _tuneproof(home, "down")
                assert down.stdout.startswith("stopped"), down.stdout + down.stderr
                assert not list(marked(ServerPlace("", 0, home)))


def _write(path: Path, users: dict[str, Any], *, by: int) -> None:
    users["count"] += by
    path.write_text(json.dumps(users))


def _start(home: Path, tiny_model_dir: Path) -> str:
    """Run `tuneproof up` with settings for the tiny model; gives the API's address."""
    give_database(home, home.parent)
    config_path = home / "settings.toml"
    config_path.write_text(settings_of(tiny_model_dir, home))
    port = free_port()
    options = ("--port", str(port), "--config", str(config_path), "--runs-at-once", "4", *SETUP)
    # Server, worker and runs begin with the libraries loaded, but for the runs of which a test says otherwise.
    started = _tuneproof(home, "up", *options, warm_children=True)
    assert started.returncode == 0, started.stdout + started.stderr
    return f"http://127.0.0.1:{port}/api"


def _tuneproof(home: Path, *arguments: str, warm_children: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["-m", "flows.cli", *arguments]
    return run_python(command, cwd=ROOT, env=clean_environment(home), warm_children=warm_children)


def settings_of(model_dir: Path, home: Path) -> str:
    """Settings of all deployments: the tiny model and a few questions, everything below `home`."""
    questions = home / "questions.jsonl"
    write_questions(questions, 6)
    return f"""
[fine_tuner]
base_model_id = "{model_dir}"
training_data_id = "{questions}"
epochs = 1
max_sequence_length = 128
[inferencer]
model = "{model_dir}"
testing_data_id = "{questions}"
max_sequence_length = 1024
max_new_tokens = 4
temperature = 0
isolation = "none"
[evaluator]
metrics = ["exact_match", "f1"]
bootstrap_resamples = 200
[pipeline]
runs_dir = "{home / "runs"}"
models_dir = "{home / "models"}"
"""


def write_questions(path: Path, count: int, topic: str = "dogs") -> Path:
    rows = [{"question": f"How many legs have {n} {topic}?", "answer": str(4 * n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
