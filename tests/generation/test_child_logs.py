"""What a child process logs is logged by its parent, who shows it."""

from __future__ import annotations

import logging
import threading
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tasks.core.generation.runners.isolation import run_in_child

LINES = 50


class UnpicklableError(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("stays here")


def _logs(connection: Connection, count: int) -> None:
    logger = logging.getLogger("tasks.core.models.loading")
    logger.debug("below the parent's level")
    try:
        raise UnpicklableError("no memory")
    except UnpicklableError:
        logger.warning("loaded %s on %s", "tiny", threading.Lock(), exc_info=True)

    def chatter(name: int) -> None:
        for line in range(count):
            logger.info("thread %d, line %d: %s", name, line, "x" * 5000)

    threads = [threading.Thread(target=chatter, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for number in range(count):
        connection.send(number)
    for thread in threads:
        thread.join()


def test_lines_of_a_child_are_logged_by_its_parent_under_their_own_names(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[int] = []
    with caplog.at_level(logging.INFO, logger="tasks"):
        assert run_in_child(_logs, LINES, heard.append) is None
    assert heard == list(range(LINES))
    first, *chatter = caplog.records
    assert first.name == "tasks.core.models.loading"
    assert first.levelno == logging.WARNING
    assert first.getMessage().startswith("loaded tiny on <unlocked")
    assert "UnpicklableError: no memory" in first.getMessage()
    assert len(chatter) == 2 * LINES
