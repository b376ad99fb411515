"""What each process of a group does, whoever started it: join, train its share, and as the first one publish."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from tasks.core.memory.processor import share_cores
from tasks.core.records import ModelManifest
from tasks.core.training import checkpoints
from tasks.core.training.job import Job
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.one import train_here
from tasks.core.training.processes.team import OthersFailedError, Team
from tasks.core.training.processes.work import SILENCE_SECONDS, Report, Strategy, TrainingWork

logger = logging.getLogger(__name__)


def take_part(work: TrainingWork, report: Report | None = None) -> ModelManifest | None:
    """Train as the process that the environment says (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    torch.distributed may be set up already; else it is here, and let go of afterwards. Returns the manifest in the
    first process, None in the others and where another process has an error to tell.
    """
    with joined_group(work.job.device, work.silence_seconds):
        return train_share(work, report)


def train_share(work: TrainingWork, report: Report | None = None) -> ModelManifest | None:
    """Train this process's share of the work of a group that it has joined; returns as `take_part` does."""
    team = team_of(work.strategy)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", team.size))
    if work.job.device == "cpu":
        share_cores(local_world)
    mine = replace(work, job=_on_own_device(work.job))
    journal = Journal.of(work.model_dir / checkpoints.CHECKPOINTS, work.group_id, tidies=team.leads)
    try:
        return train_here(mine, team, report if team.leads else None, journal)
    except OthersFailedError:
        logger.debug("another process of the group has an error to tell")
        return None


def team_of(strategy: Strategy) -> Team:
    """Where in the group this process is."""
    from torch import distributed

    return Team(distributed.get_rank(), distributed.get_world_size(), strategy)


@contextmanager
def joined_group(device: str, silence_seconds: float = SILENCE_SECONDS) -> Iterator[None]:
    """Be one of the group inside the block. What is said of numbers goes by gloo, what a GPU holds by NCCL."""
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(_local_rank())
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    timeout = timedelta(seconds=silence_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # The agent keeps its store when it begins a group again: the addresses of processes that are gone lie in it.
    own = PrefixStore(f"try-{restart_count()}", store)
    distributed.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def restart_count() -> int:
    """How often the group has been begun again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _on_own_device(job: Job) -> Job:
    """Each process has the GPU of its number on its machine."""
    if not job.device.startswith("cuda"):
        return job
    device = f"cuda:{_local_rank()}"
    return replace(job, device=device, spec=replace(job.spec, device=device))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
