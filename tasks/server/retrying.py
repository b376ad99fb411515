"""Which failures of a task are worth another try: the Hub and disks, never a mistake that a person must correct."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

RETRIES = 2
RETRY_DELAYS_SECONDS = [5.0, 30.0]

_PASSING_STATUS_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENETUNREACH}
)


def is_passing(error: BaseException) -> bool:
    """Tell whether the network or a disk caused the error, directly or further down its chain of causes."""
    return any(_is_passing_itself(link) for link in _chain(error))


def retry_if_passing(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry condition of the Prefect tasks."""
    try:
        state.result()
    except Exception as error:
        return is_passing(error)
    return False


def _is_passing_itself(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _PASSING_STATUS_CODES
    if type(error).__name__ == "OfflineModeIsEnabled":  # huggingface_hub: a ConnectionError, but a setting
        return False
    if isinstance(error, httpx.TransportError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
