"""Who trains and what they share: the one place that decides it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from tasks.core.config import FineTunerConfig
from tasks.core.errors import ConfigError
from tasks.core.memory.device_memory import total_bytes
from tasks.core.models.placement import choose_device
from tasks.core.models.specs import find_source, read_config
from tasks.core.training.job import Job
from tasks.core.training.precision import Precision, choose_precision
from tasks.core.training.processes.elastic import Elastic
from tasks.core.training.processes.joined import Joined
from tasks.core.training.processes.launched import is_joined, joined_count, local_count
from tasks.core.training.processes.on_ray.cluster import (
    asked_of_worker,
    cluster_process_count,
    device_on_cluster,
)
from tasks.core.training.processes.on_ray.group import OnRay
from tasks.core.training.processes.one import One
from tasks.core.training.processes.strategy import choose_strategy
from tasks.core.training.processes.work import Trainers, TrainingWork

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def process_count(config: FineTunerConfig) -> int:
    """How many processes share the rows of an update: as torchrun or the settings say, else one for each GPU.

    Raises ConfigError where they do not fit to what is there.
    """
    if config.runner == "ray":
        return cluster_process_count(config)
    if is_joined():
        count = joined_count()
        if config.processes not in ("auto", count):
            raise ConfigError(
                f"fine_tuner.processes = {config.processes}, but torchrun has started {count}",
                'set processes = "auto", or give torchrun that number (nnodes times nproc-per-node)',
            )
        return count
    gpus = _gpus(config.device)
    if config.processes == "auto":
        return max(1, gpus)
    if gpus and config.processes > gpus:
        there = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise ConfigError(
            f'fine_tuner.processes = {config.processes}, but device = "{config.device}" is {there}',
            'set processes = "auto", or device = "cpu"; for more machines start the command with torchrun',
        )
    return config.processes


def count_here(config: FineTunerConfig) -> int:
    """How many of the processes are on this machine, each with a device of its own where it has GPUs.

    0: all are on a cluster.
    """
    if config.runner == "ray":
        return 0
    return local_count() if is_joined() else process_count(config)


def choose_trainers(config: FineTunerConfig) -> Trainers:
    """Choose by the settings and by who started this process. Raises ConfigError."""
    if config.runner == "ray":
        if is_joined():
            raise ConfigError(
                f'torchrun has started {joined_count()} processes, and fine_tuner.runner = "ray" would start more',
                'give the command without torchrun, or set runner = "local"',
            )
        return OnRay(config)
    if is_joined():
        return Joined(config)
    return One() if process_count(config) == 1 else Elastic()


def work_of(job: Job, model_dir: Path, config: FineTunerConfig) -> TrainingWork:
    """The work that is handed to the processes; decides what they share. Raises ConfigError."""
    processes = process_count(config)
    if processes == 1:
        return TrainingWork(job, model_dir, uuid4().hex)
    model = read_config(find_source(job.spec, with_weights=False))
    choice = choose_strategy(
        config,
        model,
        job.precision,
        job.device,
        processes,
        lambda device: _of_trainer(config, total_bytes, device),
    )
    logger.info("%s", choice.described)
    return TrainingWork(job, model_dir, uuid4().hex, processes, choice.strategy)


def device_of(config: FineTunerConfig) -> str:
    """What those who train compute on: cpu, mps or cuda:N. Raises ConfigError, ModelLoadError."""
    return device_on_cluster(config) if config.runner == "ray" else choose_device(config.device)


def precision_of(config: FineTunerConfig, checkpoint_dtype: str, device: str) -> Precision:
    """The number formats of those who train (see `choose_precision`)."""
    return _of_trainer(config, choose_precision, config, checkpoint_dtype, device)


def _of_trainer(config: FineTunerConfig, question: Callable[..., Answer], *arguments: Any) -> Answer:
    if config.runner == "ray":
        return asked_of_worker(config, question, *arguments)
    return question(*arguments)


def _gpus(device: str) -> int:
    """GPUs that a setting allows: all for auto and cuda, one for cuda:N."""
    from tasks.core.models.placement import available_devices

    if ":" in device:
        return 1
    found = sum(name.startswith("cuda") for name in available_devices())
    return found if device in ("auto", "cuda") else 0
