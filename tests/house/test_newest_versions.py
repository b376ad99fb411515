"""What is installed without constraints.txt works; `make test-latest` runs this with the newest versions."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from pathlib import Path

from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parents[2]


def test_every_module_can_be_imported_with_the_installed_versions() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in ("flows", "tasks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__main__.py"
    ]
    script = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)"

    done = run_python(["-c", script], cwd=ROOT)

    assert done.returncode == 0, done.stderr


def test_what_we_use_of_prefects_inner_parts_is_there() -> None:
    """flows/server/steady.py and tasks/server/telling.py go on without them, and then a server's outage costs more."""
    from prefect import flow_engine
    from prefect.context import SyncClientContext
    from prefect.events.clients import PrefectEventsClient
    from prefect.events.worker import EventsWorker

    assert isinstance(SyncClientContext.__var__, ContextVar)
    assert isinstance(inspect.getattr_static(EventsWorker, "_instances"), dict)
    assert hasattr(EventsWorker, "_client_override")
    assert "self._client = " in inspect.getsource(EventsWorker)
    client = PrefectEventsClient("http://127.0.0.1:9/api", reconnection_attempts=7)
    assert client._reconnection_attempts == 7
    renewed = inspect.unwrap(vars(flow_engine)["maintain_concurrency_lease"])
    assert "raise_on_lease_renewal_failure" in inspect.signature(renewed).parameters
