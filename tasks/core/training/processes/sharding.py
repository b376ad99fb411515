"""A model of which each process holds a part: torch's FSDP2 by decoder layer, and checkpoints of such parts.

The first process reads the weights. The others are given the model's structure without them, and then of each weight
their part: no process but the first ever holds the whole, and that one not on its device.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.core.errors import TrainingError
from tasks.core.training.checkpoints import storing
from tasks.core.training.processes.team import Team

if TYPE_CHECKING:
    import torch
    from torch import nn

_INDEX_NAME = ".metadata"  # of torch.distributed.checkpoint
_WHOLE_NAMES = ("adapter_model.safetensors", "model.safetensors")


class ModelShards:
    """The part of a model that lies in this process, and what all processes do with their parts together."""

    def __init__(self, model: nn.Module, team: Team) -> None:
        self.model, self._team = model, team

    @classmethod
    def of(cls, whole: nn.Module | None, team: Team, device: str) -> ModelShards:
        """Share out the `whole` model that the first process has; the others give None."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        model: nn.Module = pickle.loads(team.of_leader(b"" if whole is None else _structure(whole)))
        mesh = init_device_mesh(device.partition(":")[0], (team.size,))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for part in model.modules():
            if isinstance(part, FSDPModule):  # the plain sum, as each loss is divided by the items of all
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        shards = cls(model, team)
        shards._fill(whole, only_learnt=False)
        return shards

    def clip_gradients(self, longest: float) -> torch.Tensor:
        """Shorten the gradients of all to the norm `longest`; return what it was."""
        import torch
        from torch.distributed.tensor import DTensor

        learning = [part for part in self.model.parameters() if part.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast("torch.Tensor", part.grad) for part in learning])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(learning, longest, norm)
        return norm

    def gather(self, whole: nn.Module | None) -> None:
        """Put the weights that learnt into the `whole` model of the first process, one after another."""
        import torch

        targets = {} if whole is None else dict(whole.named_parameters())
        with torch.no_grad():
            for name, part in self._parameters(only_learnt=True):
                full = part.full_tensor()
                if whole is not None:
                    targets[name].copy_(full)

    def save(self, checkpoint_dir: Path, optimizer: Any) -> None:
        """Write the parts of all; a checkpoint of them can be read by any number of processes."""
        from torch.distributed.checkpoint.state_dict_saver import save

        with storing(checkpoint_dir):
            save(_state(self.model, getattr(optimizer, "optimizer", optimizer)), checkpoint_id=checkpoint_dir)

    def load_model(self, checkpoint_dir: Path) -> None:
        """Take the weights of a checkpoint, which may be one of whole weights."""
        if is_in_parts(checkpoint_dir):
            _load(self.model, None, checkpoint_dir, alone=False)
            return
        self._fill(_weights_file(checkpoint_dir) if self._team.leads else None, only_learnt=True)

    def load_optimizer(self, checkpoint_dir: Path, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's states of a checkpoint; those of whole weights are shared out."""
        import torch
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        if is_in_parts(checkpoint_dir):
            _load(self.model, optimizer, checkpoint_dir, alone=False)
            return
        named: dict[str, Any] = {}
        if self._team.leads:
            saved = torch.load(checkpoint_dir / "optimizer.pt", weights_only=True, map_location="cpu")
            named = _by_name(saved, self.model, optimizer)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _fill(self, whole: nn.Module | dict[str, torch.Tensor] | None, *, only_learnt: bool) -> None:
        """Give each process its part of the weights that the first one has, one after another."""
        import torch
        from torch import distributed
        from torch.distributed.tensor import DTensor, distribute_tensor

        given = whole if isinstance(whole, dict) else dict(whole.named_parameters()) if whole else {}
        self._team.agree()
        with torch.no_grad():
            for name, part in self._parameters(only_learnt=only_learnt):
                assert isinstance(part, DTensor)
                if self._team.leads:
                    full = given[name].detach().to(part.device, part.dtype).contiguous()
                else:
                    full = torch.empty(part.shape, dtype=part.dtype, device=part.device)
                distributed.broadcast(full, src=0)
                own = distribute_tensor(full, part.device_mesh, part.placements, src_data_rank=None)
                part.to_local().copy_(own.to_local())

    def _parameters(self, *, only_learnt: bool) -> Iterator[tuple[str, Any]]:
        return (
            (name, part)
            for name, part in self.model.named_parameters()
            if part.requires_grad or not only_learnt
        )


def share_start(model: nn.Module, team: Team) -> None:
    """Let all processes begin with the first one's weights that learn, whatever random numbers theirs came from."""
    if team.size == 1:
        return
    import torch
    from torch import distributed

    team.agree()
    with torch.no_grad():
        for part in model.parameters():
            if part.requires_grad:
                distributed.broadcast(part, src=0)


def is_in_parts(checkpoint_dir: Path) -> bool:
    """Whether a checkpoint was written by processes that each held a part of the model."""
    return (checkpoint_dir / _INDEX_NAME).is_file()


def load_whole(model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint_dir: Path) -> None:
    """Read a checkpoint in parts into a model that this process holds alone: weights, or the optimizer's states."""
    _load(model, optimizer, checkpoint_dir, alone=True)


def _load(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint_dir: Path, *, alone: bool
) -> None:
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    state = _state(model, optimizer)
    if optimizer is not None:
        del state["model"]
    load(state, checkpoint_id=checkpoint_dir, no_dist=alone)
    if optimizer is None:
        set_model_state_dict(model, state["model"], options=_options(strict=False))
    else:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_options())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"model": get_model_state_dict(model, options=_options())}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_options())
    return state


def _options(*, strict: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=strict)


def _structure(whole: nn.Module) -> bytes:
    """The model without its weights, as one can send it."""
    import torch

    known: dict[int, Any] = {}
    for part in whole.parameters():
        empty = torch.nn.Parameter(torch.empty_like(part, device="meta"), requires_grad=part.requires_grad)
        known[id(part)] = empty
    sent = io.BytesIO()
    pickle.dump(copy.deepcopy(whole, known), sent)
    return sent.getvalue()


def _layers(model: Any) -> list[nn.Module]:
    """The decoder layers, which are shared out one by one: only one at a time lies whole on a device."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [part for part in base.modules() if type(part).__name__ in names]
    if not found:
        raise TrainingError(
            f"{type(base).__name__} does not say what its layers are, so it cannot be shared out (fsdp)",
            'set fine_tuner.strategy = "ddp"',
        )
    return found


def _weights_file(checkpoint_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that one process wrote, by the names that the model has for them."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint_dir.glob("*.safetensors")):
        for name, part in load_file(path).items():
            found[_name_in_model(name) if path.name.startswith("adapter_model") else name] = part
    return found


def _name_in_model(name: str) -> str:
    """Peft leaves the adapter's own name out of a file."""
    before, _, last = name.rpartition(".")
    if before.rpartition(".")[2] in ("lora_A", "lora_B"):
        return f"{before}.default.{last}"
    if last in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        return f"{name}.default"
    return name


def _by_name(saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state by the names of its parameters; in a file they have numbers, in the order of its groups."""
    names = {id(part): name for name, part in model.named_parameters()}
    ordered = [names[id(part)] for group in optimizer.param_groups for part in group["params"]]
    groups, at = [], 0
    for mine, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        groups.append({**theirs, "params": ordered[at : at + len(mine["params"])]})
        at += len(mine["params"])
    return {
        "state": {ordered[number]: state for number, state in saved["state"].items()},
        "param_groups": groups,
    }
