"""A Prefect API for flows in the test process, and for commands that need not start one of their own.

It takes seconds to start, so all files of one test process have the same one; what a test finds there may be of an
earlier one, so names or times tell them apart.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tests.making.warm.python import WarmPython, run_python

_SERVE = """
import sys
from flows.server.temporary_server import TemporaryServer
server = TemporaryServer()
try:
    server.wait()
    print(server.api_url, flush=True)
    sys.stdin.read()
finally:
    server.stop()
"""

# What a server does before it serves for the first time.
_MAKE_DATABASE = """
import asyncio, gc
gc.disable()
from prefect.server.database import provide_database_interface
from prefect.server.models.block_registration import run_block_auto_registration

async def make():
    database = provide_database_interface()
    await database.create_db()
    async with await database.session() as session:
        await run_block_auto_registration(session=session)

asyncio.run(make())
"""


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a database of its own, in which nothing has run."""
    home = tmp_path_factory.mktemp("prefect")
    give_database(home, tmp_path_factory.getbasetemp())
    with _served(home) as api_url:
        yield api_url
        with _named(api_url):
            _send_what_is_waiting()


@contextmanager
def _served(home: Path) -> Iterator[str]:
    """A temporary server of a process of its own, of which all begins with the libraries loaded."""
    environment = {
        **os.environ,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",  # they are in it
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    (to_read, wanted), (printed, to_print) = os.pipe(), os.pipe()
    with (home / "log.txt").open("w") as log, os.fdopen(wanted, "w") as until, os.fdopen(printed) as told:
        streams = (to_read, to_print, log.fileno())
        process = WarmPython(["-c", _SERVE], env=environment, streams=streams, warm_children=True)
        os.close(to_read)
        os.close(to_print)
        api_url = told.readline().strip()
        assert api_url, (home / "log.txt").read_text()
        try:
            yield api_url
        finally:
            until.close()
            process.wait(60)


def give_database(home: Path, temporary_dir: Path) -> None:
    """Put the database that a server would make into a Prefect home that has none.

    It takes seconds to make, so all test processes have copies of one, which lies in the temporary folder of all.
    """
    database_path = home / "prefect.db"
    shared = temporary_dir.parent if temporary_dir.name.startswith("popen-") else temporary_dir
    made_path = shared / "prefect-made.db"
    with FileLock(shared / "prefect-made.lock"):
        if not made_path.exists():
            _make(made_path)
        if not database_path.exists():
            home.mkdir(exist_ok=True)
            _copy(made_path, database_path)


def _make(path: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        run_python(["-c", _MAKE_DATABASE], env={**os.environ, "PREFECT_HOME": home}, check=True)
        _copy(Path(home) / "prefect.db", path)


def _copy(source_path: Path, target_path: Path) -> None:
    """As a backup: what a database has not yet written into its file comes along."""
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
