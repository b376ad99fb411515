"""Where a Prefect server listens and keeps its files, and what processes that use it get as environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "STARTED_BY_TUNEPROOF_UP"
_EVERY_ADDRESS = "0.0.0.0"


@dataclass(frozen=True, slots=True)
class ServerPlace:
    """The address that a server listens on, and its folder."""

    host: str
    port: int
    home: Path

    @property
    def own_api_url(self) -> str:
        """The API of a server started here, for processes of this machine."""
        host = "127.0.0.1" if self.host == _EVERY_ADDRESS else self.host
        return f"http://{host}:{self.port}/api"

    @property
    def ui_url(self) -> str:
        """The UI of a server started here, for people: on other machines too, where it listens for them."""
        host = socket.gethostname() if self.host == _EVERY_ADDRESS else self.host
        return os.environ.get("PREFECT_UI_URL") or f"http://{host}:{self.port}"

    def log_path(self, name: str) -> Path:
        """What a process printed."""
        return self.home / f"{name}.log"

    def record_path(self, name: str) -> Path:
        """Which process it is."""
        return self.home / f"{name}.json"

    def environment(self, api_url: str, *, is_own: bool) -> dict[str, str]:
        """What server, worker and deployment get: one API, the mark, no telemetry.

        Another's server keeps the Prefect home of the person, where `prefect cloud login` puts the key.
        """
        shared = {
            **os.environ,
            "PREFECT_API_URL": api_url,
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            "PWD": str(ROOT),
            MARK: str(self.home),
        }
        if not is_own:
            return shared
        return {
            **shared,
            "PREFECT_HOME": str(self.home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # In files: a server that forgot the leases when it died would never free their slots.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            # The UI asks the API where the page came from, under whatever name or through whatever tunnel.
            "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL", "/api"),
            "PREFECT_UI_URL": self.ui_url,
        }


def prefect_home() -> Path:
    """The folder of database and logs: $PREFECT_HOME, else .prefect in the checkout."""
    given = os.environ.get("PREFECT_HOME")
    return Path(given).expanduser().resolve() if given else ROOT / ".prefect"


def ui_url_of(api_url: str) -> str:
    """The UI that belongs to an API, on Prefect Cloud too."""
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api_url}):
        return str(PREFECT_UI_URL.value() or api_url.removesuffix("/api"))
