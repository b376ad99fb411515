"""A Prefect API for flows in the test process, and for commands that need not start one of their own.

It takes seconds to start, so all files of one test process have the same one; what a test finds there may be of an
earlier one, so names or times tell them apart.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a database of its own, in which nothing has run."""
    from flows.server.temporary_server import TemporaryServer

    database_path = tmp_path_factory.mktemp("prefect") / "prefect.db"
    with pytest.MonkeyPatch.context() as patch, _made_database(tmp_path_factory.getbasetemp()) as made_path:
        if made_path.exists():
            _copy(made_path, database_path)
        patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{database_path}")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        server = TemporaryServer()
        if not made_path.exists():
            server.wait()
            _copy(database_path, made_path)
    try:
        server.wait()
        yield server.api_url
        with _named(server.api_url):
            _send_what_is_waiting()
    finally:
        server.stop()


def give_database(home: Path) -> None:
    """Put the database that a server has made into a Prefect home that has none, if one is there by now."""
    database_path = home / "prefect.db"
    with _made_database(home.parent) as made_path:
        if made_path.exists() and not database_path.exists():
            home.mkdir(exist_ok=True)
            _copy(made_path, database_path)


@contextmanager
def _made_database(temporary_dir: Path) -> Iterator[Path]:
    """Where the first server of all test processes leaves the database that took it seconds to make."""
    shared = temporary_dir.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary_dir
    with FileLock(shared / "prefect-made.lock"):
        yield shared / "prefect-made.db"


def _copy(source_path: Path, target_path: Path) -> None:
    """As a backup, since a server may be at work on it."""
    with closing(sqlite3.connect(source_path)) as source, closing(sqlite3.connect(target_path)) as target:
        source.backup(target)


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
