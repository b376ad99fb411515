"""Automations of `tuneproof setup` judge the project's own runs and leave those of others on the same server alone."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import render_user_template

from flows.naming import TAG
from flows.server.provisioning import _guards, _notifications

ROOT = Path(__file__).resolve().parents[2]
OURS = {
    automation.name.removeprefix("tuneproof-"): automation
    for automation in (*_guards(90), *_notifications(uuid.uuid4()))
}


def event(name: str, *, flow: str, tags: tuple[str, ...], deployment: str | None = None) -> ReceivedEvent:
    """An event of a flow run as the server and the engine make them."""
    related = [{"prefect.resource.id": f"prefect.flow.{uuid.uuid4()}", "prefect.resource.role": "flow"}]
    related[0]["prefect.resource.name"] = flow
    if deployment:
        named = {"prefect.resource.role": "deployment", "prefect.resource.name": deployment}
        related.append({"prefect.resource.id": f"prefect.deployment.{uuid.uuid4()}", **named})
    for tag in tags:
        related.append({"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"})
    resource = {"prefect.resource.id": f"prefect.flow-run.{uuid.uuid4()}"}
    fields = {"occurred": datetime.now(UTC), "event": f"prefect.flow-run.{name}", "id": uuid.uuid4()}
    return ReceivedEvent.model_validate({**fields, "resource": resource, "related": related})


def watches(automation: AutomationCore, seen: ReceivedEvent) -> bool:
    trigger = EventTrigger.model_validate(automation.trigger.model_dump(mode="json"))
    return trigger.covers_resources(seen.resource, seen.related)


def test_runs_of_others_are_left_alone_even_when_they_are_named_like_ours() -> None:
    seen = event("heartbeat", flow="evaluate", deployment="nightly", tags=("theirs",))
    for name in ("crashed-without-heartbeat", "no-catch-up", "notify-failed", "notify-crashed"):
        assert not watches(OURS[name], seen), name


def test_runs_of_our_deployments_are_guarded_and_told_of() -> None:
    seen = event("Failed", flow="finetune-infer-evaluate", deployment="nightly", tags=(TAG, "schedule"))
    for name in ("crashed-without-heartbeat", "no-catch-up", "notify-failed", "notify-crashed"):
        assert watches(OURS[name], seen), name


def test_a_phase_of_a_pipeline_is_guarded_but_not_told_of_besides_the_pipeline() -> None:
    seen = event("Failed", flow="infer", tags=(TAG,))
    assert watches(OURS["crashed-without-heartbeat"], seen)
    assert not watches(OURS["notify-failed"], seen)


def test_all_deployments_carry_the_tag_that_automations_know_them_by() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert all(TAG in deployment["tags"] for deployment in deployments)


@pytest.mark.parametrize("payload", [{}, {"model_dir": "", "run_dir": ""}])
def test_an_event_that_does_not_say_what_to_test_does_not_stand_for_the_newest(
    payload: dict[str, str],
) -> None:
    given = {"model_dir": "/models/mine", "run_dir": "/runs/mine"}
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        for trigger in deployment.get("triggers", ()):
            ((parameter, template),) = trigger["parameters"].items()
            key = {"model": "model_dir", "run": "run_dir"}[parameter]

            def rendered(payload: dict[str, str], template: str = template) -> str:
                return asyncio.run(render_user_template(template, {"event": {"payload": payload}}))

            assert rendered(given) == given[key]
            assert rendered(payload) == f"(the event has no payload.{key})"
