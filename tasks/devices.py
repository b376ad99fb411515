"""One run at a time on a GPU: a slot of the server's concurrency limit, and a lock file.

A GPU is called by its UUID: `cuda:0` is another one on another machine or under another CUDA_VISIBLE_DEVICES.

The slot is a lease that Prefect renews while the run lives. A killed run cannot give it back: it runs out within a
minute or so. The lock file needs no server and the system frees it at once when its holder dies.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from tasks.core.files import cache_dir
from tasks.core.generation.devices import VISIBLE_DEVICES
from tasks.core.locking import HeldElsewhereError, owned_lock
from tasks.lasting_server import has_lasting_server

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60  # the shortest that Prefect takes
_POLL_SECONDS = 2.0


@contextmanager
def held_device(wanted: str, limit: str | None, *, all_of_them: bool = False) -> Iterator[None]:
    """Hold the GPU that a setting (auto, cuda, …) stands for, waiting for it; free its memory afterwards.

    `all_of_them` holds every GPU that the setting allows, for shards. A CPU is not held: batches are sized by what
    memory is free. A limit that the server does not have is no limit.
    """
    from tasks.core.generation.memory import release

    devices = _gpus(wanted, all_of_them=all_of_them)
    with ExitStack() as held:
        for name in _limits(limit, devices):
            held.enter_context(_slot(name))
        for device in devices:
            held.enter_context(_device_lock(device))
        try:
            yield
        finally:
            for device in devices:
                release(device)


def _gpus(wanted: str, *, all_of_them: bool) -> list[str]:
    """The devices to hold, in an order that is that of every run, so that two cannot wait for each other."""
    from tasks.core.models.placement import available_devices, choose_device

    device = choose_device(wanted)
    if device == "cpu":
        return []
    if all_of_them and wanted in ("auto", "cuda"):
        return sorted((found for found in available_devices() if found != "cpu"), key=_own_name)
    return [device]


def _own_name(device: str) -> str:
    """A name that no other GPU has, on any machine."""
    if not device.startswith("cuda"):
        return f"{socket.gethostname()}-{device}"
    import torch

    # A process sees one part of a divided GPU, and the UUID may be that of the whole.
    first_visible = os.environ.get(VISIBLE_DEVICES, "").split(",")[0]
    if first_visible.startswith("MIG-"):
        return first_visible
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _limits(limit: str | None, devices: Sequence[str]) -> list[str]:
    """Names of the limits; those of single GPUs are made here, since only their worker knows of them."""
    if limit is None or not devices:
        return []
    if "{device}" not in limit:
        return [limit]
    names = [limit.replace("{device}", _own_name(device)) for device in devices]
    if has_lasting_server():  # without a server, a slot of a killed run would stay taken
        for name in names:
            _make_limit(name)
    return names


def _make_limit(name: str) -> None:
    try:
        with get_client(sync_client=True) as client:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
                logger.info("made the concurrency limit %s with one slot", name)
    except httpx.HTTPError as error:
        logger.warning("the concurrency limit %s could not be made: %s", name, error)


@contextmanager
def _slot(name: str) -> Iterator[None]:
    """A slot of the limit. Waits here and not in Prefect, whose waiting is silent and hears no interrupt."""
    with ExitStack() as held:
        told = False
        while True:
            try:
                # A lease lost to a short outage of the server must not end hours of work: the locks still hold.
                slot = concurrency(
                    name, max_retries=0, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
                )
                held.enter_context(slot)
                break
            except ConcurrencySlotAcquisitionError as error:
                if not _is_taken(error):
                    raise
                if not told:
                    logger.info("waiting for a slot of the concurrency limit %s, all are taken", name)
                told = True
                time.sleep(_POLL_SECONDS)
        yield


def _is_taken(error: ConcurrencySlotAcquisitionError) -> bool:
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED


@contextmanager
def _device_lock(device: str) -> Iterator[None]:
    with ExitStack() as held:
        told = False
        while True:
            try:
                held.enter_context(owned_lock(cache_dir() / "devices" / f"{_own_name(device)}.lock"))
                break
            except HeldElsewhereError as error:
                if not told:
                    logger.info("waiting for %s, which is used by %s", device, error.holder)
                told = True
                time.sleep(_POLL_SECONDS)
        yield
