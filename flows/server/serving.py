"""`tuneproof up` and `tuneproof down`: a Prefect server and a worker on this machine, started and ended as one.

Everything is kept in one folder ($PREFECT_HOME, else .prefect in the checkout): database, logs, and who was started.
Processes are known by number and start time, and carry a mark in their environment, so that `down` ends what `up`
started, with all descendants, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
from pydantic import ValidationError

from flows.cli.console import say
from flows.server.server_place import MARK, ROOT, ServerPlace, prefect_home, ui_url_of
from tasks.core.errors import ConfigError, TuneproofError
from tasks.core.files import write_atomically
from tasks.core.locking import HeldElsewhereError, owned_lock
from tasks.core.records import Record

if TYPE_CHECKING:
    from flows.server.provisioning import Provisions

START_SECONDS = 180
STOP_SECONDS = 20
_LOG_TAIL_LINES = 15


class ServingError(TuneproofError):
    """The server or the worker could not be started or stopped."""


class Started(Record):
    """A process that `up` started; number and start time together are never used twice."""

    pid: int
    create_time: float
    api_url: str

    def process(self) -> psutil.Process | None:
        """The process if it still runs."""
        try:
            found = psutil.Process(self.pid)
            same = found.create_time() == self.create_time and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return found if same else None


def up(host: str, port: int, *, setup_options: Sequence[str]) -> None:
    """Start what does not run yet, create what the project needs, deploy, and tell the UI's address.

    With PREFECT_API_URL set, that server is used and only a worker is started here. Raises ServingError when a
    port is taken or something does not start, ConfigError for a wrong setting.
    """
    place = ServerPlace(host, port, prefect_home())
    with _alone(place):
        server, worker = _running(place, "server"), _running(place, "worker")
        given_url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
        api_url = given_url or (server.api_url if server else place.own_api_url)
        _refuse_worker_of_another_server(worker, api_url, given=bool(given_url))
        if worker is not None and (given_url or server):
            say(f"already running: {ui_url_of(worker.api_url)} (make down ends it)")
            return
        is_own = not given_url or (server is not None and server.api_url == given_url)
        environment = place.environment(api_url, is_own=is_own)
        if not given_url and server is None:
            _start_server(place, environment)
        _provision(api_url, environment, setup_options)
        _deploy(environment)
        if worker is None:
            _start_worker(place, environment, api_url)
        say(f"Prefect UI: {place.ui_url if not given_url and server is None else ui_url_of(api_url)}")
        say(f"logs: {place.log_path('server')}, {place.log_path('worker')}")
        say(f"to use it from a shell: export PREFECT_API_URL={api_url}")


def down() -> None:
    """End the worker, its runs and the server that `up` started; answers that are there stay."""
    place = ServerPlace("", 0, prefect_home())
    with _alone(place):
        ended = [name for name in ("worker", "server") if _stop(place, name)]
        orphans = _stop_all(list(marked(place)))
        if orphans:
            ended.append(f"{orphans} process{'es' if orphans > 1 else ''} left behind")
        say(f"stopped: {', '.join(ended)}" if ended else "nothing was running")


def _refuse_worker_of_another_server(worker: Started | None, api_url: str, *, given: bool) -> None:
    if worker is None or worker.api_url == api_url:
        return
    wanted = f"PREFECT_API_URL is {api_url}" if given else "PREFECT_API_URL is not set"
    raise ServingError(
        f"a worker of {worker.api_url} is running here, and {wanted}",
        f"end that worker with `make down`, or set PREFECT_API_URL={worker.api_url}",
    )


@contextmanager
def _alone(place: ServerPlace) -> Iterator[None]:
    """Two `up` at once would start two servers on one database."""
    try:
        with owned_lock(place.home / "up.lock"):
            yield
    except HeldElsewhereError as error:
        raise ServingError(
            f"`up` or `down` is at work already: {error.holder}", "wait for it to end, then try again"
        ) from error


def _start_server(place: ServerPlace, environment: dict[str, str]) -> None:
    _refuse_taken_port(place)
    say(f"starting a Prefect server on port {place.port} …")
    command = ["server", "start", "--host", place.host, "--port", str(place.port)]
    process = _start(place, "server", command, environment, place.own_api_url)
    _wait_until(lambda: _is_healthy(place.own_api_url), process, place, "server", "the Prefect server")


def _refuse_taken_port(place: ServerPlace) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place.host, place.port))
        except OSError as error:
            is_prefect = _is_healthy(place.own_api_url)
            use = f"set PREFECT_API_URL={place.own_api_url} to use that server, or " if is_prefect else ""
            raise ServingError(
                f"port {place.port} on {place.host} is taken"
                f"{' by another Prefect server' if is_prefect else f' ({error.strerror})'}",
                f"{use}choose another port: make up PORT={place.port + 1}",
            ) from error


def _is_healthy(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _provision(api_url: str, environment: dict[str, str], options: Sequence[str]) -> None:
    """Set up in a process of its own: Prefect's settings are read once, and these are new."""
    say("work pool, limits, variables, automations …")
    done = subprocess.run([sys.executable, "-m", "flows.cli", "setup", *options], cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise ServingError(f"{api_url} could not be set up, see above", "correct it, then run `up` again")


def _deploy(environment: dict[str, str]) -> None:
    say("deploying everything in prefect.yaml …")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-_LOG_TAIL_LINES:])
        raise ServingError(f"the deployments were not accepted:\n{output}", "correct prefect.yaml, try again")


def _start_worker(place: ServerPlace, environment: dict[str, str], api_url: str) -> None:
    from flows.server.provisioning import WORK_POOL

    # No --limit: with it, a run that is retried while its last attempt is being cleared away ends the worker
    # (Prefect 3.8). The work pool's limit does the same on the server.
    command = ["worker", "start", "--pool", WORK_POOL, "--type", "process"]
    process = _start(place, "worker", command, environment, api_url)
    log_path = place.log_path("worker")
    _wait_until(lambda: "started!" in _read(log_path), process, place, "worker", "the worker")


def _start(
    place: ServerPlace, name: str, arguments: list[str], environment: dict[str, str], api_url: str
) -> subprocess.Popen[bytes]:
    """Start `prefect …` that outlives this command, and write down which process it is."""
    with place.log_path(name).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    started = Started(pid=process.pid, create_time=psutil.Process(process.pid).create_time(), api_url=api_url)
    write_atomically(place.record_path(name), started.model_dump_json())
    return process


def _wait_until(
    is_ready: Callable[[], bool], process: subprocess.Popen[bytes], place: ServerPlace, name: str, what: str
) -> None:
    """Wait for a process that was started. Raises ServingError when it ends before it is ready, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready():
            return
        time.sleep(0.2)
    _stop(place, name)
    log_path = place.log_path(name)
    tail = "\n".join(_read(log_path).splitlines()[-_LOG_TAIL_LINES:])
    raise ServingError(f"{what} did not start:\n{tail}", f"read {log_path}, then run the same command again")


def _running(place: ServerPlace, name: str) -> Started | None:
    try:
        started = Started.model_validate_json(place.record_path(name).read_bytes())
    except (OSError, ValidationError):
        return None
    return started if started.process() else None


def _stop(place: ServerPlace, name: str) -> bool:
    """End a process and its descendants: politely, then for good. True when it was running."""
    started = _running(place, name)
    process = started.process() if started else None
    if process is not None:
        _stop_all([process, *process.children(recursive=True)])
    place.record_path(name).unlink(missing_ok=True)
    return process is not None


def _stop_all(processes: list[psutil.Process]) -> int:
    """Ask all to end, wait, and kill those that do not; return how many there were."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
    return len(processes)


def marked(place: ServerPlace) -> Iterator[psutil.Process]:
    """Processes that carry the mark of this folder, such as runs whose worker was killed."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(place.home) and process.pid != os.getpid():
                yield process
        except psutil.Error:
            continue


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def set_up(wanted: Provisions) -> None:
    """Create what the project needs on the server of PREFECT_API_URL.

    Raises ConfigError without one, ServingError when it does not answer or does not let us in.
    """
    from prefect.settings import PREFECT_API_URL

    from flows.server.provisioning import provision

    if not PREFECT_API_URL.value():
        raise ConfigError(
            "there is no Prefect server to set up: PREFECT_API_URL is not set",
            "run `make up` for a server on this machine, or set PREFECT_API_URL to the one you have",
        )
    api_url = PREFECT_API_URL.value()
    try:
        lines = asyncio.run(provision(wanted))
    except httpx.HTTPStatusError as error:
        raise _refusal(api_url, error.response.status_code) from error
    except httpx.TransportError as error:
        raise ServingError(
            f"no Prefect server answers at {api_url} ({error or type(error).__name__})",
            "start that server, or unset PREFECT_API_URL and run `make up`, which starts one here",
        ) from error
    for line in lines:
        say(f"  {line}")


def _refusal(api_url: str, status: int) -> ServingError:
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return ServingError(
            f"{api_url} does not let us in (HTTP {status})",
            "log in with `prefect cloud login`, or set PREFECT_API_KEY, or PREFECT_API_AUTH_STRING for a server "
            "with a password",
        )
    return ServingError(
        f"{api_url} answered with HTTP {status}",
        "check the address, which ends in /api or, on Prefect Cloud, with the workspace; then the server's log",
    )
