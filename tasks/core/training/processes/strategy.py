"""What the processes of a training share, by the memory that a device needs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.data.formats.limits import size_text
from tasks.core.errors import ConfigError
from tasks.core.memory.device_memory import total_bytes
from tasks.core.training.processes.work import Strategy

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tasks.core.config import FineTunerConfig
    from tasks.core.training.precision import Precision

_SHARED: tuple[Strategy, Strategy] = ("ddp", "fsdp")
_USABLE = 0.9  # of a device; the rest is for the libraries' own and for what lies between allocations
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ADAM_STATES = 2
# Whose step is the same on a part of a weight as on the whole, and whose states torch can share out.
SHARED_OUT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """Bytes that a training takes on each device, estimated from the model's shape."""

    weights: int
    learning: int
    """Gradients and the optimizer's states of the weights that learn, in float32."""
    activations: int
    layer: int
    """The largest part that lies whole on a device while its process computes with it."""

    def on_each(self, strategy: Strategy, processes: int) -> int:
        """Bytes on each of the devices."""
        if strategy != "fsdp":
            return self.weights + self.learning + self.activations
        return (self.weights + self.learning) // processes + 2 * self.layer + self.activations


def device_need(config: FineTunerConfig, model: PretrainedConfig, weights_dtype: str) -> DeviceNeed:
    """What a device needs for a model of this shape.

    Activations are those of one piece of an update: for each of its tokens the layers' intermediate results, or their
    inputs alone with gradient checkpointing, and the logits where they are learnt, at most all of them.
    """
    text = model.get_text_config()
    hidden, layers, vocabulary = int(text.hidden_size), int(text.num_hidden_layers), int(text.vocab_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    heads = int(text.num_attention_heads)
    key_values = int(getattr(text, "num_key_value_heads", None) or heads) * hidden // heads
    layer = 2 * hidden * (hidden + key_values) + 3 * hidden * inner
    ends = vocabulary * hidden * (1 if getattr(text, "tie_word_embeddings", False) else 2)
    count = layers * layer + ends
    bits = 4 if config.load_in_4bit else 8 if config.load_in_8bit else 8 * _BYTES[weights_dtype]
    adapter = layers * config.rank * (4 * hidden + 2 * (hidden + key_values) + 3 * (hidden + inner))
    learnt = count if config.full_finetuning else adapter
    weights = count * bits // 8 + (0 if config.full_finetuning else 4 * adapter)
    tokens = config.device_train_batch_size * config.max_sequence_length
    per_layer = hidden if config.use_gradient_checkpointing else 8 * hidden + 4 * inner
    activations = tokens * 2 * (layers * per_layer + vocabulary)
    return DeviceNeed(
        weights, 4 * learnt * (1 + _ADAM_STATES), activations, max(layer, ends) * max(bits, 16) // 8
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """What is shared, and what a device needs for it."""

    strategy: Strategy
    processes: int
    need: DeviceNeed
    device_bytes: int

    @property
    def described(self) -> str:
        """`ddp needs about 9.1 GB on each of 2 devices, fsdp 5.2 GB; there are 8.0 GB: fsdp`."""
        ddp, fsdp = (size_text(self.need.on_each(way, self.processes)) for way in _SHARED)
        there = f"there are {size_text(self.device_bytes)}"
        return f"ddp needs about {ddp} on each of {self.processes} devices, fsdp {fsdp}; {there}: {self.strategy}"


def choose_strategy(
    config: FineTunerConfig,
    model: PretrainedConfig,
    precision: Precision,
    device: str,
    processes: int,
    measured: Callable[[str], int] = total_bytes,
) -> Choice:
    """The strategy of the settings, or with `auto` the one that fits: `ddp` before `fsdp`, which sends more.

    `model` is the base's configuration, `measured` gives the bytes that a device has in all. Raises ConfigError for
    `fsdp` where it cannot be.
    """
    problem = why_not_shared_out(config, precision.compute)
    if processes > 1 and config.strategy == "fsdp" and problem is not None:
        raise ConfigError(f'fine_tuner.strategy = "fsdp" cannot be kept: {problem}', 'set strategy = "ddp"')
    need, there = device_need(config, model, precision.weights), measured(device)
    if device == "cpu":
        there //= processes  # they share one memory
    if processes == 1:
        chosen: Strategy = "one"
    elif config.strategy != "auto":
        chosen = config.strategy
    else:
        chosen = fitting_strategy(need, processes, int(_USABLE * there), problem)
    return Choice(chosen, processes, need, there)


def fitting_strategy(need: DeviceNeed, processes: int, usable_bytes: int, problem: str | None) -> Strategy:
    """`ddp` where it fits or `fsdp` cannot be; what fits in neither way is cut into smaller pieces later."""
    fits = need.on_each("ddp", processes) <= usable_bytes
    return "ddp" if fits or problem is not None else "fsdp"


def why_not_shared_out(config: FineTunerConfig, compute: str) -> str | None:
    """Why weights cannot be shared out between processes with these settings; None where they can."""
    if config.load_in_4bit or config.load_in_8bit:
        return "bitsandbytes keeps quantised weights in blocks with scales, which torch cannot cut into parts"
    if config.loftq_config is not None:
        return "loftq_config takes the whole model on a GPU to begin with"
    if compute == "float16":
        return "float16 needs a scale of the loss that all parts of a gradient share, which torch does not do here"
    if config.optimizer not in SHARED_OUT_OPTIMIZERS:
        return (
            f"the optimizer {config.optimizer} wants whole weights; {', '.join(SHARED_OUT_OPTIMIZERS)} do not"
        )
    if config.neftune_noise_alpha is not None:
        return "neftune_noise_alpha changes what the embedding gives, whose weights would lie in several processes"
    return None
