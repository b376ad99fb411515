"""One run at a time on a GPU: a slot of the server's concurrency limit, and a lock file of this machine.

The slot is a lease that Prefect renews while the run lives. A killed run cannot give it back: it runs out within a
minute or so. The lock file needs no server and the system frees it at once when its holder dies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.concurrency.sync import concurrency

from tasks.core.files import cache_dir
from tasks.core.locking import HeldElsewhereError, owned_lock

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60  # the shortest that Prefect takes
_POLL_SECONDS = 1.0


@contextmanager
def held_device(wanted: str, limit: str | None, *, all_of_them: bool = False) -> Iterator[None]:
    """Hold the GPU that a setting (auto, cuda, …) stands for, waiting for it; free its memory afterwards.

    `all_of_them` holds every GPU that the setting allows, for shards. A CPU is not held: batches are sized by what
    memory is free. A limit that the server does not have is no limit.
    """
    from tasks.core.generation.memory import release

    devices = _gpus(wanted, all_of_them=all_of_them)
    with ExitStack() as held:
        if limit is not None:
            for name in dict.fromkeys(limit.replace("{device}", _slug(device)) for device in devices):
                # A lease lost to a short outage of the server must not end hours of work: the locks still hold.
                slot = concurrency(name, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
                held.enter_context(slot)
        for device in devices:
            held.enter_context(_device_lock(device))
        try:
            yield
        finally:
            for device in devices:
                release(device)


def _gpus(wanted: str, *, all_of_them: bool) -> list[str]:
    """The devices to hold, always in the same order, so that two runs cannot wait for each other."""
    from tasks.core.models.placement import available_devices, choose_device

    device = choose_device(wanted)
    if device == "cpu":
        return []
    if all_of_them and wanted in ("auto", "cuda"):
        return [found for found in available_devices() if found != "cpu"]
    return [device]


@contextmanager
def _device_lock(device: str) -> Iterator[None]:
    with ExitStack() as held:
        told = False
        while True:
            try:
                held.enter_context(owned_lock(cache_dir() / "devices" / f"{_slug(device)}.lock"))
                break
            except HeldElsewhereError as error:
                if not told:
                    logger.info("waiting for %s, which is used by %s", device, error.holder)
                told = True
                time.sleep(_POLL_SECONDS)
        yield


def _slug(device: str) -> str:
    return device.replace(":", "-")
