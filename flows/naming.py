"""Names of flow runs that tell, in a list of runs, which is which, and the tag of all."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePath
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from tasks.server.telling import courier, has_own_run, root_run

# Of deployments, their runs and the phases of these; automations know them by it.
TAG = "tuneproof"
_TELLING_PARAMETERS = ("run_name", "run", "model", "dataset", "test_dataset")


def began_at() -> datetime | None:
    """When the run of the deployment was created: a retry has the same time, so it finds what it made before.

    None outside of deployments, where nothing is retried and one script may train several times.
    """
    root = root_run()
    return None if root is None or root.deployment_id is None else root.created


def rename_run(*told: str) -> None:
    """Name the running flow run after what it found out, e.g. `infer · smollm2-a1b2 · gsm8k · 1,319 rows`.

    A run neither waits for its name nor fails because of it.
    """
    if flow_run.id is None or not has_own_run():
        return
    run_id, name = UUID(flow_run.id), " · ".join([flow_run.flow_name or "run", *told])

    def rename() -> None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(run_id, name=name)

    courier().send(f"the run's name {name}", rename, replaces=("name", run_id))


def told_rows(count: int) -> str:
    """`1,319 rows`, or `1 row`."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def name_of_run() -> str:
    """Name the flow run after its flow and the parameters that tell most, e.g. `infer · smollm2 · gsm8k`."""
    parameters = flow_run.parameters
    given = (parameters.get(name) for name in _TELLING_PARAMETERS)
    told = [PurePath(value).name for value in given if isinstance(value, str) and value]
    return " · ".join([flow_run.flow_name or "run", *(told or [str(flow_run.id)[:8]])])
