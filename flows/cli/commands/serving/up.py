"""`tuneproof up`: a Prefect server and a worker on this machine."""

from __future__ import annotations

from dataclasses import asdict

from flows.cli.commands.serving.setup import DEFAULT_SERVING, Serving
from flows.cli.console import prepare_console


def up(
    *,
    host: str = "127.0.0.1",
    port: int = 4200,
    serving: Serving = DEFAULT_SERVING,
) -> None:
    """Start a Prefect server and a worker on this machine, set up and deploy everything; see `down`.

    With PREFECT_API_URL set, that server is used and only the worker is started.
    """
    from flows.server import serving as local

    prepare_console()
    given = {name: value for name, value in asdict(serving).items() if value is not None}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    local.up(host, port, setup_options=options)
