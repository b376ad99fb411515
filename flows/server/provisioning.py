"""What the project needs on a Prefect server: work pool, limits, variables, automations. Creating it twice is once.

`tuneproof setup` runs this; deployments and their triggers come from prefect.yaml (`prefect deploy --all`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CancelFlowRun, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import Cancelled
from prefect.variables import Variable

from flows.naming import TAG
from tasks.core.errors import ConfigError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient

WORK_POOL = "tuneproof"
GPU_LIMIT = "gpu"
CONFIG_VARIABLE = "tuneproof_config"
NOTIFY_VARIABLE = "tuneproof_notify_block"
QUICKSTART_CONFIG = "examples/quickstart/config.toml"
# A night that was missed by more than this is left out; the next one comes.
LATEST_START = timedelta(hours=1)
# The same happening within this time is told once: the server may see an event twice.
_ONCE = timedelta(minutes=1)

_ENDS = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled")]
_WAITS = ["prefect.flow-run.Paused", "prefect.flow-run.Suspended"]
_FLOW_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
# A server may serve others too, whose flows and deployments may be named like ours; so the tag decides.
_OUR_TAG = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
_A_DEPLOYMENT = {"prefect.resource.role": "deployment"}
_RUN_LINK = "{{ flow_run|ui_url }}"


@dataclass(frozen=True, slots=True)
class Provisions:
    """What `tuneproof setup` makes. `notify_block` is type/name of a block; None keeps what was set before."""

    config: str | None = None
    runs_at_once: int = 2
    gpus: int = 1
    notify_block: str | None = None
    crashed_after_seconds: int = 90


async def provision(wanted: Provisions) -> list[str]:
    """Create what is missing and bring the automations up to date; return a line for each thing.

    Limits and variables that exist keep their values, since they may have been set in the UI. ConfigError when
    the notification block does not exist.
    """
    async with get_client() as client:
        lines = [
            await _ensure_work_pool(client, wanted.runs_at_once),
            await _ensure_gpu_limit(client, wanted.gpus),
            await _ensure_config_variable(wanted.config),
        ]
        for automation in _guards(wanted.crashed_after_seconds):
            lines.append(await _ensure_automation(client, automation))
        block = await _notify_block(wanted.notify_block)
        if block is None:
            lines.append("notifications: off; turn them on with `tuneproof setup --notify-block TYPE/NAME`")
        else:
            block_id = await _block_id(client, block)
            for automation in _notifications(block_id):
                lines.append(await _ensure_automation(client, automation))
        missed = await _cancel_missed_runs(client)
        return [*lines, f"scheduled runs that were missed: {missed} cancelled"] if missed else lines


async def _ensure_work_pool(client: PrefectClient, runs_at_once: int) -> str:
    pool = WorkPoolCreate(name=WORK_POOL, type="process", concurrency_limit=runs_at_once)
    try:
        await client.create_work_pool(pool)
    except ObjectAlreadyExists:
        found = await client.read_work_pool(WORK_POOL)
        return (
            f"work pool {WORK_POOL}: there, {found.type}, {found.concurrency_limit or 'any number'} at once"
        )
    return f"work pool {WORK_POOL}: created, {runs_at_once} at once"


async def _ensure_gpu_limit(client: PrefectClient, gpus: int) -> str:
    try:
        found = await client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=gpus))
        return f"concurrency limit {GPU_LIMIT}: created, {gpus} at once"
    return f"concurrency limit {GPU_LIMIT}: there, {found.limit} at once"


async def _ensure_config_variable(config_path: str | None) -> str:
    current = await Variable.aget(CONFIG_VARIABLE)
    if current is not None and config_path in (None, current):
        return f"variable {CONFIG_VARIABLE}: there, {current}"
    chosen = config_path or ("config.toml" if Path("config.toml").is_file() else QUICKSTART_CONFIG)
    await Variable.aset(CONFIG_VARIABLE, chosen, overwrite=True)
    return f"variable {CONFIG_VARIABLE}: set to {chosen}"


async def _ensure_automation(client: PrefectClient, wanted: AutomationCore) -> str:
    """Create or update by name; one that was paused stays so."""
    found = await client.read_automations_by_name(wanted.name)
    if not found:
        await client.create_automation(wanted)
        return f"automation {wanted.name}: created"
    first, *copies = found
    wanted = wanted.model_copy(update={"enabled": first.enabled})
    there = AutomationCore(**first.model_dump(include=set(AutomationCore.model_fields)))
    # An update makes the server forget what it is watching for, so it happens only for a reason.
    if there != wanted:
        await client.update_automation(first.id, wanted)
    for copy in copies:
        await client.delete_automation(copy.id)
    state = "there" if there == wanted else "updated"
    return f"automation {wanted.name}: {state}" + ("" if first.enabled else ", paused")


def _guards(crashed_after_seconds: int) -> Iterator[AutomationCore]:
    """Automations that a server of one's own lacks: dead runs are marked, missed nights are left out."""
    beat = "prefect.flow-run.heartbeat"
    yield AutomationCore(
        name="tuneproof-crashed-without-heartbeat",
        description="A run that is silent was killed together with its worker: it is marked as crashed.",
        trigger=EventTrigger(
            after={beat},
            expect={beat, *_ENDS, *_WAITS},
            match=_FLOW_RUNS,
            match_related=_OUR_TAG,  # phases of a pipeline carry it too
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=crashed_after_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No sign of life for {crashed_after_seconds} s. Retry resumes where it stopped.",
            )
        ],
    )
    yield AutomationCore(
        name="tuneproof-no-catch-up",
        description="A scheduled run that nobody took within an hour is cancelled; the next one comes.",
        trigger=EventTrigger(
            after={"prefect.flow-run.Late"},
            expect={"prefect.flow-run.Pending", "prefect.flow-run.Running", *_ENDS},
            match=_FLOW_RUNS,
            match_related=[_OUR_TAG, _A_DEPLOYMENT | {"prefect.resource.name": "nightly"}],
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=LATEST_START,
        ),
        actions=[CancelFlowRun()],
    )


def _notifications(block_id: UUID) -> Iterator[AutomationCore]:
    """One automation each for runs that failed, runs that crashed, and verdicts `reject`."""

    def notify(subject: str, body: str) -> list[SendNotification]:
        return [SendNotification(block_document_id=block_id, subject=subject, body=body)]

    for state in ("Failed", "Crashed"):
        yield AutomationCore(
            name=f"tuneproof-notify-{state.lower()}",
            description=f"Tells when a run of a deployment has {state.lower()}.",
            trigger=EventTrigger(
                expect={f"prefect.flow-run.{state}"},
                match=_FLOW_RUNS,
                match_related=[_OUR_TAG, _A_DEPLOYMENT],
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
                within=_ONCE,
            ),
            actions=notify(
                f"tuneproof: {{{{ flow_run.name }}}} {state.lower()}",
                f"{{{{ flow_run.state.message }}}}\nRetry resumes where it stopped: {_RUN_LINK}",
            ),
        )
    yield AutomationCore(
        name="tuneproof-notify-rejected",
        description="Tells when a model was not better than what it was compared with.",
        trigger=EventTrigger(
            expect={"tuneproof.evaluation.finished"},
            match={
                "prefect.resource.id": ["tuneproof.evaluation.*", "tuneproof.pipeline.evaluation.*"],
                "tuneproof.verdict": "reject",
            },
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=_ONCE,
        ),
        actions=notify(
            "tuneproof: {{ event.payload.run_name }} was rejected",
            "{{ event.payload.answer }}\nReport: {{ event.payload.run_dir }}/report.html",
        ),
    )


async def _notify_block(given: str | None) -> str | None:
    """Remember the block that was given; without one, tell which was remembered."""
    if given is not None:
        return given
    remembered = await Variable.aget(NOTIFY_VARIABLE)
    return str(remembered) if remembered else None


async def _block_id(client: PrefectClient, block: str) -> UUID:
    block_type, _, name = block.partition("/")
    try:
        if not block_type or not name:
            raise ValueError(block)
        document = await client.read_block_document_by_name(name, block_type, include_secrets=False)
    except (ObjectNotFound, ValueError) as error:
        raise ConfigError(
            f"there is no notification block {block!r} on the server",
            "create one in the UI under Blocks (Slack, e-mail, webhook, …) and name it as "
            "TYPE/NAME, e.g. slack-webhook/my-channel",
        ) from error
    await Variable.aset(NOTIFY_VARIABLE, block, overwrite=True)
    return document.id


async def _cancel_missed_runs(client: PrefectClient) -> int:
    """Cancel scheduled runs whose time passed while no server was there to notice."""
    missed = await client.read_flow_runs(
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG, "schedule"])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC) - LATEST_START),
        ),
    )
    missed = [run for run in missed if run.auto_scheduled]
    for run in missed:
        await client.set_flow_run_state(run.id, Cancelled(message="Its time had passed; catch-up is off."))
    return len(missed)
