"""Standard layers on CPU, run through fewer and better prepared operations for the time of a generation.

A transformers model is not changed: while `fused_layers` is open, its linear layers multiply with a copy of
their weights that oneDNN has laid out beforehand (otherwise it does so at every call), gated MLPs apply
activation and product inside the multiplication, and RMS norms are one operation. A layer is only replaced
when it is of a known kind and gives the same values on a sample.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.core.memory.device_memory import free_bytes
from tasks.core.memory.processor import prepares_bfloat16, prepares_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Prepared weights are a second copy: they are made only when they take a small part of the free memory.
LARGEST_SHARE_OF_FREE_MEMORY = 0.25
# Rows of activations that oneDNN should expect when it chooses the layout.
EXPECTED_ROWS = 64
_SAMPLE_ROWS = 5
_TOLERANCE = {4: 1e-4, 2: 5e-2}

Forward = Callable[..., "torch.Tensor"]
_prepared: weakref.WeakKeyDictionary[Any, _PreparedModel] = weakref.WeakKeyDictionary()


@contextmanager
def fused_layers(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` run prepared layers inside the block, its own before and after.

    Weights are prepared once a model, and anew when they have changed. Does nothing where nothing is gained:
    off the CPU, without oneDNN, for quantised weights, or when memory is short.
    """
    replaced: list[torch.nn.Module] = []
    try:
        for module, forward in _forwards(model).items():
            if "forward" not in vars(module):  # a hook of somebody else's stays
                module.forward = forward
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward  # the class's own shows again


class _PreparedModel:
    """The prepared layers of one model, and the state of the weights that they were made from."""

    def __init__(self, model: PreTrainedModel, state: tuple[tuple[int, int], ...]) -> None:
        self.state = state
        linears = {name: module for name, module in model.named_modules() if _is_plain_linear(module)}
        packed = {id(module): _PackedLinear(module) for module in linears.values()}
        # Kept by name: the modules hold no reference to this object, nor this object to the model.
        self.forwards: dict[str, Forward] = {name: packed[id(module)] for name, module in linears.items()}
        for name, module in model.named_modules():
            fused = _gated_mlp(module, packed) or _rms_norm(module)
            if fused is not None and _gives_the_same(module, fused):
                self.forwards[name] = fused


def _forwards(model: PreTrainedModel) -> dict[torch.nn.Module, Forward]:
    if not _can_prepare(model):
        return {}
    state = _weight_state(model)
    prepared = _prepared.get(model)
    if prepared is None or prepared.state != state:
        if not _fits(model):
            logger.debug("too little memory for prepared weights")
            return {}
        prepared = _prepared[model] = _PreparedModel(model, state)
    modules = dict(model.named_modules())
    return {modules[name]: forward for name, forward in prepared.forwards.items()}


def _can_prepare(model: PreTrainedModel) -> bool:
    import torch

    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not dtypes <= {torch.float32, torch.bfloat16} or not prepares_weights():
        return False
    return torch.bfloat16 not in dtypes or prepares_bfloat16()


def _weight_state(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Where each weight lies and how often it was changed in place."""
    return tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in model.parameters()
    )


def _fits(model: PreTrainedModel) -> bool:
    import torch

    needed = sum(
        module.weight.numel() * module.weight.element_size()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    return needed <= LARGEST_SHARE_OF_FREE_MEMORY * free_bytes("cpu")


def _is_plain_linear(module: torch.nn.Module) -> bool:
    """Whether nothing but torch's own linear layer runs: no adapter, no quantisation, no hook's forward."""
    import torch

    return type(module) is torch.nn.Linear and "forward" not in vars(module)


class _PackedLinear:
    """A linear layer's weights as oneDNN wants them; shapes as in torch.nn.Linear."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        import torch

        self.bias = linear.bias
        with torch.inference_mode():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), EXPECTED_ROWS)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return self.with_activation(input, "none")

    def with_activation(self, states: torch.Tensor, activation: str) -> torch.Tensor:
        """Return activation(x W^T + b); `activation` is one of oneDNN's names, such as swish."""
        import torch

        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.weight, self.bias, activation, [], ""
        )
        return result

    def times(self, states: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return (x W^T + b) * factor."""
        import torch

        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            states, factor, self.weight, self.bias, "mul"
        )
        return result


def _gated_mlp(module: torch.nn.Module, packed: dict[int, _PackedLinear]) -> Forward | None:
    """Compute down(silu(gate(x)) * up(x)) in three operations, as in Llama, Qwen and Mistral."""
    parts = [packed.get(id(getattr(module, name, None))) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = parts
    if gate is None or up is None or down is None or "forward" in vars(module):
        return None

    def forward(states: torch.Tensor) -> torch.Tensor:
        return down(up.times(states, gate.with_activation(states, "swish")))

    return forward


def _rms_norm(module: torch.nn.Module) -> Forward | None:
    """Divide by the root mean square and multiply by the weight, in one operation (Zhang and Sennrich 2019)."""
    import torch

    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or not isinstance(epsilon, float):
        return None

    def forward(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(states, weight.shape, weight, epsilon)

    return forward


def _gives_the_same(module: torch.nn.Module, fused: Forward) -> bool:
    """Whether both give equal values, up to rounding, on a sample of shape [1, rows, inputs]."""
    import torch

    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, _SAMPLE_ROWS, weight.shape[-1], generator=generator).to(weight.dtype)
    with torch.inference_mode():
        try:
            mine, theirs = fused(sample).float(), module(sample).float()
        except (RuntimeError, TypeError):
            return False
    difference = (mine - theirs).norm() / theirs.norm().clamp(min=1e-9)
    return bool(difference <= _TOLERANCE[weight.element_size()])
