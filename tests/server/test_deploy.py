"""`prefect deploy --all` from a checkout, on a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from tests.making.warm.python import WarmPython
from tests.server.conftest import ROOT, SETUP, Server, wait_until

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def deployments(server: Server) -> dict[str, dict[str, Any]]:
    return server.deployments()


def test_deploying_all_registers_five_described_deployments(deployments: dict[str, dict[str, Any]]) -> None:
    assert set(deployments) == {
        "nightly", "manual", "infer-after-training", "evaluate-after-inference", "infer-new-data",
    }  # fmt: skip
    assert all(
        found["description"] and found["work_pool_name"] == "tuneproof" and "tuneproof" in found["tags"]
        for found in deployments.values()
    )


def test_their_version_is_the_commit(deployments: dict[str, dict[str, Any]]) -> None:
    described = subprocess.run(
        ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    expected = described.stdout.strip() or "unknown"
    assert {found["version"].removesuffix("-dirty") for found in deployments.values()} == {expected}


def test_each_runs_once_at_a_time_and_an_overlapping_night_is_left_out(
    deployments: dict[str, dict[str, Any]],
) -> None:
    assert {found["global_concurrency_limit"]["limit"] for found in deployments.values()} == {1}
    strategies = {
        name: found["concurrency_options"]["collision_strategy"] for name, found in deployments.items()
    }
    assert strategies.pop("nightly") == "CANCEL_NEW"
    assert set(strategies.values()) == {"ENQUEUE"}


def test_the_next_nights_are_scheduled(server: Server) -> None:
    nights = wait_until(lambda: server.runs_of("nightly"))
    assert len(nights) >= 3
    assert all(night["expected_start_time"][11:19] == "02:00:00" for night in nights)


def test_a_worker_will_run_them_in_the_checkout_they_were_deployed_from(
    deployments: dict[str, dict[str, Any]],
) -> None:
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
    assert all(found["pull_steps"] == [step] for found in deployments.values())


def test_the_nightly_one_has_an_active_schedule_with_a_timezone(
    deployments: dict[str, dict[str, Any]],
) -> None:
    (schedule,) = deployments["nightly"]["schedules"]
    assert schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 2 * * *", "Etc/UTC")
    assert not any(found["schedules"] for name, found in deployments.items() if name != "nightly")


def test_the_form_has_described_fields_that_all_may_stay_empty(
    deployments: dict[str, dict[str, Any]],
) -> None:
    for found in deployments.values():
        schema = found["parameter_openapi_schema"]
        assert not schema.get("required")
        assert all(field.get("description") for field in schema["properties"].values()), schema


def test_each_event_starts_the_next_deployment_with_what_it_carries(
    server: Server, deployments: dict[str, dict[str, Any]]
) -> None:
    found = automations(server)
    expected = {
        "tuneproof-infer-after-training": ("tuneproof.model.trained", "infer-after-training", "model"),
        "tuneproof-evaluate-after-inference": (
            "tuneproof.predictions.ready",
            "evaluate-after-inference",
            "run",
        ),
    }
    for name, (event, deployment, parameter) in expected.items():
        (action,) = found[name]["actions"]
        assert found[name]["trigger"]["expect"] == [event]
        assert action["deployment_id"] == deployments[deployment]["id"]
        assert str(action["parameters"][parameter]).find("event.payload") > 0


def test_setting_up_and_deploying_again_changes_nothing(
    server: Server, deployments: dict[str, dict[str, Any]]
) -> None:
    before = {name: found["id"] for name, found in automations(server).items()}
    were_started = server.events_start_runs()
    assert server.tuneproof("setup", *SETUP).returncode == 0
    assert server.prefect("--no-prompt", "deploy", "--all").returncode == 0
    server.let_events_start_runs(were_started)  # these automations are made anew
    assert {name: found["id"] for name, found in server.deployments().items()} == {
        name: found["id"] for name, found in deployments.items()
    }
    guards = {"tuneproof-crashed-without-heartbeat", "tuneproof-no-catch-up"}
    after = {name: found["id"] for name, found in automations(server).items()}
    assert after.keys() == before.keys()
    assert {name: after[name] for name in guards} == {name: before[name] for name in guards}


def automations(server: Server) -> dict[str, dict[str, Any]]:
    found = server.post("/automations/filter")
    assert len({automation["name"] for automation in found}) == len(found)
    return {automation["name"]: automation for automation in found}


def test_the_kubernetes_template_is_accepted(server: Server) -> None:
    template = json.loads((ROOT / "docs/deploy/kubernetes-job-template.json").read_text())
    made = server.post("/work_pools/", name="on-kubernetes", type="kubernetes", base_job_template=template)
    assert made["base_job_template"]["variables"] == template["variables"]
    server.ask("DELETE", "/work_pools/on-kubernetes")


ON_A_GPU = """
from types import SimpleNamespace
import torch
from tasks.core.memory import device_memory
from tasks.core.models import placement

placement.available_devices = lambda: ["cuda:0", "cpu"]
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="zero")
device_memory.release = lambda device: None
"""


@contextmanager
def on_a_gpu(server: Server, script: str) -> Iterator[tuple[WarmPython, IO[str]]]:
    """Run a script on a machine with one GPU, whose UUID is zero; what it prints can be read."""
    reader, writer = os.pipe()
    with Path(os.devnull).open() as nothing, (server.home / "on-a-gpu.log").open("w") as log:
        process = WarmPython(
            ["-c", ON_A_GPU + script],
            cwd=ROOT,
            env={**server.environment, "TUNEPROOF_CACHE": str(server.home / "cache")},
            streams=(nothing.fileno(), writer, log.fileno()),
        )
    os.close(writer)
    try:
        with os.fdopen(reader) as output:
            yield process, output
    finally:
        process.kill()
        process.wait()


def test_a_run_on_a_gpu_holds_a_slot_of_the_limit_and_gives_it_back(server: Server) -> None:
    script = """
from prefect.client.orchestration import get_client
from tasks.server.devices import held_device

def taken(name):
    with get_client(sync_client=True) as client:
        return client._client.get(f"/v2/concurrency_limits/{name}").json()["active_slots"]

for limit, name in (("gpu", "gpu"), ("gpu-{device}", "gpu-GPU-zero")):
    with held_device("auto", limit):
        print("within:", taken(name))
    print("after:", taken(name))
"""
    with on_a_gpu(server, script) as (_, output):
        told = output.read().splitlines()
    assert told == ["within: 1", "after: 0"] * 2, (server.home / "on-a-gpu.log").read_text()


def test_a_run_that_waits_for_a_slot_says_so_in_its_logs_and_ends_when_it_is_interrupted(
    server: Server,
) -> None:
    server.post("/v2/concurrency_limits/", name="taken", limit=1)
    server.post("/v2/concurrency_limits/increment", names=["taken"], slots=1, mode="concurrency")
    script = """
from prefect import flow
from prefect.runtime import flow_run
from tasks.ui.run_logs import send_core_logs_to_prefect
from tasks.server.devices import held_device

@flow
def waits():
    send_core_logs_to_prefect()
    print(flow_run.id, flush=True)
    with held_device("auto", "taken"):
        pass

waits()
"""
    with on_a_gpu(server, script) as (process, output):
        run_id = output.readline().strip()
        told = "waiting for a slot of the concurrency limit taken"
        wait_until(lambda: told in server.logs(run_id))
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert time.monotonic() - interrupted < 30
        assert server.logs(run_id).count(told) == 1
