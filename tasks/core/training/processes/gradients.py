"""Gradients of all processes, added up before the optimizer sees them.

Each process's loss is divided by the items of the whole update, so the gradient of the update is the plain sum. That is
exact at uneven ends too: a process that had no rows adds nothing. torch's DistributedDataParallel would take the mean
over processes and wants the same passes in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tasks.core.training.processes.team import Team

if TYPE_CHECKING:
    import torch

_BUCKET_BYTES = 32 * 2**20  # sent at once: few messages, and little memory besides the gradients


def add_up_gradients(model: torch.nn.Module, team: Team) -> None:
    """Make the gradients of the parameters that learn those of all processes. Comes after an agreement."""
    import torch

    for bucket in _buckets(model):
        parts = [torch.zeros_like(part) if part.grad is None else part.grad for part in bucket]
        joined = torch.cat([part.reshape(-1) for part in parts])
        team.add_up([joined])
        at = 0
        for parameter in bucket:
            summed = joined[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
            if parameter.grad is None:
                parameter.grad = summed.clone()
            else:
                parameter.grad.copy_(summed)


def _buckets(model: torch.nn.Module) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters that learn, of one number format and about 32 MB at a time, in the same order everywhere."""
    bucket: list[torch.nn.Parameter] = []
    held = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        size = parameter.numel() * parameter.element_size()
        if bucket and (held + size > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    if bucket:
        yield bucket
