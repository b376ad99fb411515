"""Whether torchrun, or what sets its variables, has started this process beside others; asked at every start."""

from __future__ import annotations

import os

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_joined() -> bool:
    """Whether this process is one of several that something else has started to train together."""
    return all(name in os.environ for name in _NEEDED) and joined_count() > 1


def joined_count() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"])


def local_count() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether another process leads, which alone speaks to Prefect and publishes."""
    return is_joined() and int(os.environ["RANK"]) > 0
