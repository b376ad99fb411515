"""One run at a time on a GPU: a slot of the server's concurrency limit, and a lock file.

A GPU is called by its UUID: `cuda:0` is another one on another machine or under another CUDA_VISIBLE_DEVICES.

The slot is a lease that is renewed while the run lives. A killed run cannot give it back: it runs out within a
minute or so. The lock file needs no server and the system frees it at once when its holder dies.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectNotFound

from tasks.core.files import cache_dir
from tasks.core.generation.runners.seats import VISIBLE_DEVICES
from tasks.core.locking import HeldElsewhereError, owned_lock
from tasks.server.lasting_server import has_lasting_server
from tasks.server.telling import courier, is_away, server_answers, server_name

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60  # the shortest that Prefect takes
_RENEW_SECONDS = LEASE_SECONDS / 3
_POLL_SECONDS = 2.0
_GIVE_BACK_SECONDS = 3.0


@contextmanager
def held_device(
    wanted: str, limit: str | None, *, all_of_them: bool = False, most: int | None = None
) -> Iterator[None]:
    """Hold the GPU that a setting (auto, cuda, …) stands for, waiting for it; free its memory afterwards.

    `all_of_them` holds every GPU that the setting allows, or the first `most` of them: for shards, and for a training
    in several processes. A CPU is not held: batches are sized by what
    memory is free. A limit that the server does not have is no limit.
    """
    from tasks.core.memory.device_memory import release

    devices = _gpus(wanted, all_of_them=all_of_them, most=most)
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


def _gpus(wanted: str, *, all_of_them: bool, most: int | None = None) -> list[str]:
    """The devices to hold, in an order that is that of every run, so that two cannot wait for each other."""
    from tasks.core.models.placement import available_devices, choose_device

    device = choose_device(wanted)
    if device == "cpu":
        return []
    if all_of_them and wanted in ("auto", "cuda"):
        return sorted([found for found in available_devices() if found != "cpu"][:most], key=_own_name)
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
    if has_lasting_server() and server_answers():  # without a server, a slot of a killed run would stay taken
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
    """A slot of the limit; when the server is away, the locks of this machine have to do."""
    slot = _Slot(name)
    try:
        slot.take()
    except Exception as error:
        if not is_away(error):
            raise
        logger.warning("%s does not answer: no slot of the limit %s is taken", server_name(), name)
    try:
        yield
    finally:
        slot.let_go()


class _Slot:
    """A slot of a limit, a lease that is renewed beside the work.

    Prefect's own `concurrency` waits silently and hears no interrupt, gives a lease up for good that it could not renew
    for a minute, and waits for the server to give it back.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lease_id: UUID | None = None
        self._over = threading.Event()

    def take(self) -> None:
        """Wait until a slot is free and take it."""
        if not server_answers():
            raise httpx.ConnectError("asked in vain")
        told = False
        while not self._is_taken():
            if not told:
                logger.info("waiting for a slot of the concurrency limit %s, all are taken", self._name)
            told = True
            time.sleep(_POLL_SECONDS)
        if self._lease_id is not None:
            keeper = copy_context()
            threading.Thread(target=keeper.run, args=(self._keep,), name="slot", daemon=True).start()

    def let_go(self) -> None:
        """Give the slot back, when the server is there."""
        self._over.set()
        if self._lease_id is not None:
            courier().send(f"the end of the slot of {self._name}", self._give_back)
            courier().is_empty_within(_GIVE_BACK_SECONDS)  # whoever asks next finds it free

    def _is_taken(self) -> bool:
        """Ask for a slot; False when there is none free, True also where there is no such limit."""
        try:
            with get_client(sync_client=True) as client:
                given = client.increment_concurrency_slots_with_lease(
                    names=[self._name], slots=1, mode="concurrency", lease_duration=LEASE_SECONDS
                ).json()
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return False
            raise
        self._lease_id = UUID(given["lease_id"]) if given["limits"] else None
        return True

    def _keep(self) -> None:
        while not self._over.wait(_RENEW_SECONDS):
            courier().send(f"the slot of {self._name}", self._renew, replaces=self)

    def _renew(self) -> None:
        if self._over.is_set() or self._lease_id is None:
            return
        try:
            with get_client(sync_client=True) as client:
                client.renew_concurrency_lease(lease_id=self._lease_id, lease_duration=LEASE_SECONDS)
        except (ObjectNotFound, httpx.HTTPStatusError) as error:
            if is_away(error):
                raise
            # It ran out while the server was away.
            if not self._is_taken():
                logger.debug("the slot of %s was given to another run", self._name)

    def _give_back(self) -> None:
        if self._lease_id is not None:
            with get_client(sync_client=True) as client:
                client.release_concurrency_slots_with_lease(lease_id=self._lease_id)


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
