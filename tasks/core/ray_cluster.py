"""A connection to a Ray cluster, the same for training and for shards; one at a time in a process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.core.errors import ConfigError, first_line
from tasks.core.interruption import unheard_by_children

_NAMESPACE = "tuneproof"
_QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0"}


@contextmanager
def ray_connection(address: str | None, *, shows_output: bool = False) -> Iterator[None]:
    """Be connected to a cluster inside the block; without an address to the one of RAY_ADDRESS, or one begun here.

    `shows_output` prints here what workers print. What a program has connected before stays connected. Raises
    ConfigError where nothing answers.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _own_signal_handlers(), unheard_by_children():
        try:
            ray.init(address, namespace=_NAMESPACE, log_to_driver=shows_output, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            ray.shutdown()
            raise _no_connection(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _no_connection(address: str | None, error: Exception) -> ConfigError:
    place = f" at {address}" if address else ""
    return ConfigError(
        f"there is no Ray cluster to connect to{place}: {first_line(error)}",
        "see `ray status` on its head; the address is host:port on a machine of the cluster, and ray://host:10001 "
        "elsewhere; one that wants a token needs RAY_AUTH_MODE=token and the token (RAY_AUTH_TOKEN) here too",
    )


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers there are; Ray puts its own into the place of that for SIGTERM, which is a cancel to us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
