"""What children do in tests of `run_in_child`; kept apart from those, so that a new interpreter imports little more."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tasks.core.errors import DataError
from tasks.core.generation.runners.isolation import run_in_child


def raises(connection: Connection, message: str) -> None:
    raise DataError(message, "do something else")


def raises_what_cannot_be_pickled(connection: Connection, message: str) -> None:
    import httpx

    request = httpx.Request("GET", "http://localhost")
    raise httpx.HTTPStatusError(message, request=request, response=httpx.Response(500, request=request))


def leaves_a_child(connection: Connection | None, pid_path: str) -> None:
    run_in_child(sleeps, pid_path, print)


def sleeps(connection: Connection, pid_path: str) -> None:
    Path(pid_path).write_text(str(os.getpid()))
    time.sleep(600)


def speaks(connection: Connection, count: int) -> None:
    for number in range(count):
        connection.send(number)
