"""`tuneproof setup`: what the project needs on a Prefect server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import Parameter

from flows.cli.console import prepare_console


@Parameter(name="*")
@dataclass(frozen=True)
class Serving:
    """What the project gets on a Prefect server."""

    config: Annotated[
        str | None, Parameter(help="Settings file of the deployments; config.toml, else the quickstart's.")
    ] = None
    runs_at_once: Annotated[int, Parameter(help="Runs at the same time, for a new work pool.")] = 2
    gpus: Annotated[int, Parameter(help="Runs that may use a GPU at once, where no limit is set yet.")] = 1
    notify_block: Annotated[
        str | None,
        Parameter(help="Prefect block that tells of failed, crashed and rejected runs: TYPE/NAME."),
    ] = None
    crashed_after_seconds: Annotated[
        int,
        Parameter(help="A run that is silent for so long is marked as crashed; heartbeats come every 30 s."),
    ] = 90


DEFAULT_SERVING = Serving()


def setup(*, serving: Serving = DEFAULT_SERVING) -> None:
    """Create work pool, limits, variables and automations on the server of PREFECT_API_URL; again is harmless."""
    prepare_console()
    from flows.server.provisioning import Provisions
    from flows.server.serving import set_up

    set_up(Provisions(**asdict(serving)))
