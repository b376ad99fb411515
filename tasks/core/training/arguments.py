"""transformers' TrainingArguments for exactly one device.

Left alone, Trainer takes the first GPU whatever the model lies on, and spreads batches over all that it sees. What the
processes of a group share is our own (`processes/`): accelerate would give rows twice at an uneven end, take the mean
over processes, and wrap a model for DDP where FSDP was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
# By these accelerate would see that there is a group.
_GROUP_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
)


def training_arguments(device: str, **settings: Any) -> TrainingArguments:
    """Arguments that keep everything on `device` (cpu, mps or cuda:N); `settings` are transformers' own."""
    import torch
    from transformers import TrainingArguments

    with _accelerate_device(device):
        arguments = TrainingArguments(
            use_cpu=device == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            save_total_limit=None,  # rotation is ours: only sealed checkpoints count
            dataloader_pin_memory=device.startswith("cuda"),
            **settings,
        )
        assert arguments.device is not None  # sets accelerate's state up, while the variable holds
    if device.startswith("cuda"):
        arguments.__dict__["_setup_devices"] = torch.device(device)
        arguments._n_gpu = 1
        torch.cuda.set_device(device)
    return arguments


@contextmanager
def _accelerate_device(device: str) -> Iterator[None]:
    """Let accelerate see this device, and no other process."""
    names = (_DEVICE_VARIABLE, *_GROUP_VARIABLES)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[_DEVICE_VARIABLE] = device
    try:
        yield
    finally:
        del os.environ[_DEVICE_VARIABLE]
        os.environ.update(before)
