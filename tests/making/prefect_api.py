"""A Prefect API for flows in the test process, and for commands that need not start one of their own.

It takes seconds to start, so all files of one test process have the same one; what a test finds there may be of an
earlier one, so names or times tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with an empty database of its own."""
    from flows.server.temporary_server import TemporaryServer

    database = tmp_path_factory.mktemp("prefect") / "prefect.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{database}")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        server = TemporaryServer()
    try:
        server.wait()
        yield server.api_url
        with _named(server.api_url):
            _send_what_is_waiting()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def prefect_api(prefect_server: str) -> Iterator[str]:
    """The address of the server; flows of this file run on it."""
    with _named(prefect_server):
        yield prefect_server


@contextmanager
def _named(api_url: str) -> Iterator[None]:
    """Prefect's settings name this server, in all threads."""
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: api_url}),
        _temporary_global_settings_context(get_settings_context()),
    ):
        yield


def _send_what_is_waiting() -> None:
    """Let Prefect's own threads send logs and events while the server is there; else they complain at the end."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.instance().drain()
    EventsWorker.drain_all()
