"""What is told to Prefect's server beside the work, by a thread of its own: the work never waits for it.

A server may be stopped, killed, restarted, or answer after a minute. Messages wait meanwhile and are sent when it is
back; of a progress bar only the newest counts. They are few, so what no longer fits is dropped.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from functools import cache

import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext, SettingsContext, SyncClientContext, get_settings_context
from prefect.events.clients import PrefectEventsClient
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLOUD_API_URL

from tasks.core.errors import first_line
from tasks.core.interruption import raise_if_interrupted
from tasks.server.lasting_server import is_temporary_server

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
PATIENCE_VARIABLE = "TUNEPROOF_PREFECT_PATIENCE_SECONDS"
"""Environment variable: how long the end of a run waits for a server that is away, to tell it how the run ended."""

_PING_SECONDS = 3.0
_ASK_AGAIN_SECONDS = 1.0
# A temporary server that hangs is waited for a little; nobody looks at it, and one that died never comes back.
_PATIENCE_WITH_TEMPORARY_SECONDS = 10.0
_MOST_WAITING = 500
_LAST_WAIT_SECONDS = 5.0
# About one a second, or one in ten seconds where the server hangs.
_EVENT_TRIES = 90
_PASSING_STATUS_CODES = frozenset({408, 425, 429, 502, 503, 504})

_root_run: ContextVar[FlowRun | None] = ContextVar("root_run", default=None)
_without_own_run: ContextVar[bool] = ContextVar("without_own_run", default=False)


@dataclass(eq=False, slots=True)
class _Message:
    what: str
    call: Callable[[], object]
    context: Context = field(default_factory=copy_context)

    def is_delivered(self) -> bool:
        """Send it; False when the server is away, so that it has to be sent again."""
        try:
            self.context.run(self._send)
        except Exception as error:  # whatever the server or its client says: the work it tells of is done
            if is_away(error):
                return False
            logger.warning("%s could not be shown: %s", self.what, first_line(error))
        return True

    def _send(self) -> None:
        # The run's own client is closed when the run ends.
        SyncClientContext.__var__.set(_own_client())
        with _one_try():
            self.call()


class Courier:
    """Sends messages to the server one after the other; the thread begins with the first and is a daemon."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, _Message] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # For flows of others, which use our tasks and end without asking.
        atexit.register(self.is_empty_within, _LAST_WAIT_SECONDS)

    def send(self, what: str, call: Callable[[], object], *, replaces: Hashable = None) -> None:
        """Let `call` tell the server; it belongs to the run in which this was called.

        What waits with the same `replaces` is not sent any more: only the newest of a kind counts.
        """
        message = _Message(what, call)
        key = message if replaces is None else replaces
        with self._changed:
            if key not in self._waiting and len(self._waiting) >= _MOST_WAITING:
                logger.debug("%s is not shown: too much is waiting for the server", what)
                return
            self._waiting[key] = message
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver, name="courier", daemon=True)
                self._thread.start()

    def is_empty_within(self, seconds: float) -> bool:
        """Wait until all is sent, for so long at most; tell whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def forget(self) -> int:
        """Drop what is waiting; return how much it was."""
        with self._changed:
            count = len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        return count

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                key, message = next(iter(self._waiting.items()))
            delivered = message.is_delivered()
            if not delivered:
                time.sleep(_ASK_AGAIN_SECONDS)
                # What a stopped server has not answered it may still do later: asking does no harm twice.
                while not message.context.run(server_answers):
                    time.sleep(_ASK_AGAIN_SECONDS)
                continue
            with self._changed:
                if self._waiting.get(key) is message:  # else a newer one came meanwhile
                    del self._waiting[key]
                self._changed.notify_all()


_courier: Courier | None = None
_courier_lock = threading.Lock()


def courier() -> Courier:
    """The courier of this process."""
    global _courier
    with _courier_lock:
        if _courier is None:
            _courier = Courier()
        return _courier


@cache
def _client_of(address: str | None) -> SyncClientContext:
    """A client for messages to one server, open as long as the process."""
    own = SyncClientContext()
    own.client.__enter__()
    return own


def _own_client() -> SyncClientContext:
    return _client_of(PREFECT_API_URL.value())


@contextmanager
def _one_try() -> Iterator[None]:
    """Requests inside the block are sent once; Prefect would wait up to a minute between two tries."""
    now = get_settings_context()
    client = now.settings.client.model_copy(update={"max_retries": 0})
    # A copy: Prefect's own way of changing a setting reads all of them again, which takes long.
    with SettingsContext(profile=now.profile, settings=now.settings.model_copy(update={"client": client})):
        yield


def is_away(error: BaseException | None) -> bool:
    """Tell whether an error says that the server cannot be reached at the moment, and not that it refuses."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, httpx.TransportError):
            return True
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in _PASSING_STATUS_CODES:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def is_of_prefect(error: BaseException) -> bool:
    """Tell whether an error is one of the server or its client."""
    return is_away(error) or isinstance(error, PrefectException | httpx.HTTPError)


def server_answers(seconds: float = _PING_SECONDS) -> bool:
    """Ask the server whether it is there."""
    return not is_away(_asked(seconds))


def refuses_connections() -> bool:
    """Tell whether nothing listens where the server should be."""
    return isinstance(_asked(_PING_SECONDS), httpx.ConnectError)


def _asked(seconds: float) -> Exception | None:
    """What asking the server whether it is there ends with."""
    try:
        # A client of its own for each question would read all certificates first, which takes longer than the answer.
        with _one_try():
            _own_client().client.request("GET", "/health", timeout=seconds)
        return None
    except Exception as error:  # an address that is none, a certificate that cannot be read
        return error


def wait_for_server(what: str, seconds: float | None = None) -> bool:
    """Wait until the server answers, `seconds` at most; `what` it is for is told when it does not at once.

    Tell whether it answers. Raises KeyboardInterrupt when the work is to end.
    """
    if server_answers():
        return True
    patience = patience_seconds() if seconds is None else seconds
    if is_temporary_server():
        patience = 0.0 if refuses_connections() else min(patience, _PATIENCE_WITH_TEMPORARY_SECONDS)
    if patience:
        logger.warning("%s does not answer: waiting up to %.0f s %s", server_name(), patience, what)
    deadline = time.monotonic() + patience
    while (left := deadline - time.monotonic()) > 0:
        raise_if_interrupted()
        time.sleep(min(left, _ASK_AGAIN_SECONDS))
        if server_answers():
            logger.info("Prefect's server answers again")
            return True
    return False


def patience_seconds() -> float:
    """How long the end of a run waits for a server that is away."""
    try:
        return max(0.0, float(os.environ.get(PATIENCE_VARIABLE, PATIENCE_SECONDS)))
    except ValueError:
        return PATIENCE_SECONDS


def server_name() -> str:
    """The server with its address, without a password in it."""
    address = PREFECT_API_URL.value()
    if not address:
        return "Prefect's server"
    return f"Prefect's server at {httpx.URL(address).copy_with(username=None, password=None)}"


def keep_events() -> None:
    """Keep events for a server that is away, of whose own make; Prefect drops each after some seconds."""
    address = PREFECT_API_URL.value()
    is_cloud = str(address).startswith(PREFECT_CLOUD_API_URL.value())
    if address and not is_cloud and getattr(EventsWorker, "_client_override", None) is None:
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=_EVENT_TRIES)


def forget_events() -> None:
    """Try no longer to send the events that wait; the process would not end before."""
    for worker in tuple(getattr(EventsWorker, "_instances", {}).values()):
        client = getattr(worker, "_client", None)
        if isinstance(client, PrefectEventsClient):
            client._reconnection_attempts = 0


@contextmanager
def root_of_runs(run: FlowRun | None) -> Iterator[None]:
    """Inside the block all runs belong to this one; a root that is known already stays."""
    token = _root_run.set(_root_run.get() or run)
    try:
        yield
    finally:
        _root_run.reset(token)


def root_run() -> FlowRun | None:
    """The run that was started from outside and that the flow at work is a part of; asks no server."""
    return _root_run.get()


@contextmanager
def without_own_run() -> Iterator[None]:
    """A phase inside the block has no run of its own on the server: it goes on in that of its pipeline."""
    token = _without_own_run.set(True)
    try:
        yield
    finally:
        _without_own_run.reset(token)


def is_phase() -> bool:
    """Tell whether a flow at work is a phase of a pipeline."""
    if _without_own_run.get():
        return True
    context = FlowRunContext.get()  # prefect.runtime would ask the server
    return (
        context is not None
        and context.flow_run is not None
        and context.flow_run.parent_task_run_id is not None
    )


def has_own_run() -> bool:
    """Tell whether the flow at work has a run of its own on the server."""
    return not _without_own_run.get()
