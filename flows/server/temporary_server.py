"""The Prefect server of one command, where no other is named.

Prefect would start one itself, but in the process group of the command: Ctrl-C in a terminal ends it first, and the
command then waits minutes for it. It would also outlive a killed command. This one has a session of its own and ends
with its command. It starts while Prefect, the flow and what that needs are imported, and child processes find it by
its address.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from tasks.core.errors import TuneproofError

START_SECONDS = 180.0
_STOP_SECONDS = 3.0
_LOG_TAIL_LINES = 15
_SCRIPT = Path(__file__).with_name("serve_temporarily.py")


class TemporaryServer:
    """A server on a free port of this machine, for this process and its children."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with socket.socket() as listener:
            # Bound here: no other process can take the port, and requests wait until the server answers.
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(os.getpid()), str(listener.fileno())],
                env=_environment(), pass_fds=[listener.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until the server answers. Raises TuneproofError when it ends before, or takes too long."""
        import httpx

        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(trust_env=False, timeout=1) as client:
            while self._process.poll() is None and time.monotonic() < deadline:
                with suppress(httpx.HTTPError):
                    if client.get(f"{self.api_url}/health").is_success:
                        return
                time.sleep(0.1)
        raise self._not_started()

    def _not_started(self) -> TuneproofError:
        code = self._process.poll()
        happened = (
            f"it took more than {START_SECONDS:.0f} s" if code is None else f"it ended with code {code}"
        )
        self._log.seek(0)
        told = self._log.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return TuneproofError(
            f"Prefect's local server did not start: {happened}" + "".join(f"\n  {line}" for line in told),
            "try again when the machine is less busy, or start `prefect server start` and set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api",
        )

    def stop(self) -> None:
        """End the server; what it stored stays."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def server_for_flows() -> TemporaryServer | None:
    """Start a server that ends with this process; None where the settings name another or forbid to start one."""
    if os.environ.get("PREFECT_API_URL"):
        return None
    # Begun before Prefect's settings are read, which takes a second; these seldom name a server.
    server = TemporaryServer()
    try:
        from prefect.context import refresh_global_settings_context

        from tasks.server.lasting_server import TEMPORARY_ADDRESS

        if is_server_named() or not _may_be_started():
            server.stop()
            return None
    except BaseException:
        server.stop()
        raise
    # Before the services that send logs and events to it: what is registered last comes first at the end.
    atexit.register(server.stop)
    os.environ.update(dict.fromkeys(("PREFECT_API_URL", TEMPORARY_ADDRESS), server.api_url))
    refresh_global_settings_context()
    return server


def is_server_named() -> bool:
    """Tell whether the settings name a Prefect server: the environment, a profile or a file."""
    from prefect.settings import get_current_settings

    return bool(get_current_settings().api.url)


def _may_be_started() -> bool:
    """Prefect can be told never to start a server."""
    from prefect.settings import get_current_settings

    return get_current_settings().server.ephemeral.enabled


def _environment() -> dict[str, str]:
    """What Prefect gives a temporary server of its own."""
    return {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        # Type checks at run time of a library behind it: a tenth of a second to install.
        "PY_KEY_VALUE_DISABLE_BEARTYPE": "1",
    }
