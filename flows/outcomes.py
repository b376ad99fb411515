"""Final states of flow runs that say more than Completed."""

from __future__ import annotations

import logging
from typing import TypeVar, cast

from prefect.states import Completed

Result = TypeVar("Result")

logger = logging.getLogger("tasks.outcomes")


def already_done(what: str, result: Result) -> Result:
    """Give what a flow returns to end as `Already done`: its caller gets `result`, the UI shows the state.

    A duplicate event starts a run that finds its work done; it must not look like one that worked.
    """
    logger.info("%s", what)
    return cast(Result, Completed(name="Already done", message=what, data=result))
