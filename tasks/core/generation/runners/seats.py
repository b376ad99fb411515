"""Which processes answer at once, on which device each, with how many threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.core.memory.processor import cpu_cores, share_cores

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def visible_gpus(device: str) -> tuple[str, ...]:
    """Names (as in CUDA_VISIBLE_DEVICES) of the GPUs that `device` of the settings lets be used.

    A named one, such as cuda:1, is that one; auto and cuda are all. Starts no CUDA context.
    """
    if not device.startswith(("auto", "cuda")):
        return ()
    import torch

    count = torch.cuda.device_count()
    configured = os.environ.get(VISIBLE_DEVICES)
    names = [str(number) for number in range(count)] if configured is None else configured.split(",")[:count]
    _, _, number = device.partition(":")
    return tuple(names[int(number) : int(number) + 1] if number else names)


def process_count(wanted: int | None, shards: int, gpus: Sequence[str]) -> int:
    """Processes to start: as wanted, else one for each GPU, else one for each core; never more than shards."""
    return min(shards, wanted or len(gpus) or cpu_cores())


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a process works: on which GPU (None: on the cores), shared by how many processes."""

    gpu: str | None = None
    processes: int = 1

    def take(self) -> None:
        """Keep this process to its GPU or its share of the cores; call it before the model is loaded."""
        if self.gpu is not None:
            os.environ[VISIBLE_DEVICES] = self.gpu
        else:
            share_cores(self.processes)


ALONE = Seat()
