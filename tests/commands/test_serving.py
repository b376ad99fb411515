"""`tuneproof up` and `setup` on a server of somebody else: the key arrives, refusals and absence are told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from flows.server.server_place import ServerPlace
from flows.server.serving import ServingError, Started, up

ROOT = Path(__file__).resolve().parents[2]
KEY = "pnu_of_a_person"
PROFILE = 'active = "cloud"\n[profiles.cloud]\nPREFECT_API_KEY = "{key}"\n'


@dataclass
class Workspace:
    """An address like Prefect Cloud's, which lets nobody in; it keeps what was shown to it."""

    url: str
    shown: list[str | None] = field(default_factory=list)


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.shown.append(self.headers["Authorization"])
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        made = Workspace(f"http://127.0.0.1:{server.server_port}/api")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


@pytest.fixture
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home of somebody who did `prefect cloud login` and has no other settings."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "profiles.toml").write_text(PROFILE.format(key=KEY))
    return tmp_path


def tuneproof(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a new interpreter: Prefect reads the person's HOME when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_key_of_prefect_cloud_login_reaches_the_workspace_and_a_refusal_is_told(
    person: Path, workspace: Workspace
) -> None:
    place = ServerPlace("127.0.0.1", 4200, person / "checkout" / ".prefect")
    told = tuneproof("setup", **place.environment(workspace.url, is_own=False))
    assert set(workspace.shown) == {f"Bearer {KEY}"}
    assert told.returncode == 1
    assert f"{workspace.url} does not let us in (HTTP 401)" in told.stderr
    assert "prefect cloud login" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_server_of_ones_own_gets_no_key_and_keeps_its_files_in_the_checkout(person: Path) -> None:
    place = ServerPlace("127.0.0.1", 4200, person / "checkout" / ".prefect")
    environment = place.environment(place.own_api_url, is_own=True)
    script = """
from prefect.server.concurrency.lease_storage import get_concurrency_lease_storage
from prefect.settings import get_current_settings
settings = get_current_settings()
print(settings.home, settings.api.key, get_concurrency_lease_storage().storage_path)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(place.home), "None", str(place.home / "concurrency_leases")]


def test_a_server_that_is_not_there_is_told_without_a_traceback(person: Path) -> None:
    told = tuneproof("setup", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert told.returncode == 1
    assert "no Prefect server answers at http://127.0.0.1:9/api" in told.stderr
    assert "unset PREFECT_API_URL" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_server_for_every_address_is_reached_by_name_from_elsewhere_and_by_loopback_here(
    monkeypatch: pytest.MonkeyPatch, person: Path
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box")
    place = ServerPlace("0.0.0.0", 4300, person)
    environment = place.environment(place.own_api_url, is_own=True)
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4300/api"
    assert environment["PREFECT_UI_URL"] == "http://gpu-box:4300"
    assert environment["PREFECT_UI_API_URL"] == "/api"


def test_a_worker_of_another_server_is_not_taken_for_one_of_this_server(
    person: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(person))
    this = {"pid": os.getpid(), "create_time": psutil.Process().create_time()}
    record = Started.model_validate({**this, "api_url": "http://old-server:4200/api"})
    ServerPlace("", 0, person).record_path("worker").write_text(record.model_dump_json())

    monkeypatch.setenv("PREFECT_API_URL", "http://new-server:4200/api")
    with pytest.raises(ServingError) as refused:
        up("127.0.0.1", 4200, setup_options=())
    assert "a worker of http://old-server:4200/api is running here" in str(refused.value)
    assert "PREFECT_API_URL is http://new-server:4200/api" in str(refused.value)

    monkeypatch.setenv("PREFECT_API_URL", "http://old-server:4200/api/")
    up("127.0.0.1", 4200, setup_options=())
    assert capsys.readouterr().out.startswith("already running: http://old-server:4200 ")
