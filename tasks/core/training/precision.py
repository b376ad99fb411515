"""In which number formats a training computes: that of the weights held, and that of the arithmetic."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tasks.core.memory.processor import computes_in_bfloat16

if TYPE_CHECKING:
    from tasks.core.config import FineTunerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """`compute` is the format of the matrix products, `weights` that of the base's weights in memory.

    Trained weights and the optimizer's states are always float32: in 16 bits, small updates are rounded away.
    """

    compute: Literal["float32", "float16", "bfloat16"]
    weights: Literal["float32", "float16", "bfloat16"]


def choose_precision(config: FineTunerConfig, checkpoint_dtype: str, device: str) -> Precision:
    """The setting's dtype, else the checkpoint's, as far as the device computes in it fast and safely.

    An adapter is trained beside frozen weights in that format; a full fine-tuning holds float32 weights.
    """
    wanted = config.dtype or checkpoint_dtype
    compute = _possible(str(wanted), device)
    if compute != wanted:
        logger.info("%s is trained in %s: %s does not compute well in %s", device, compute, device, wanted)
    return Precision(compute, "float32" if config.full_finetuning else compute)


def _possible(wanted: str, device: str) -> Literal["float32", "float16", "bfloat16"]:
    if wanted not in ("float16", "bfloat16") or device.startswith("mps"):
        return "float32"  # MPS has no gradient scaler, and its autocast is young
    if device == "cpu":
        # float16 has no fast kernels on CPUs; without bfloat16 instructions bfloat16 has none either.
        return "bfloat16" if computes_in_bfloat16() else "float32"
    if wanted == "bfloat16" and not _gpu_has_bfloat16():
        return "float16"
    return "float16" if wanted == "float16" else "bfloat16"


def _gpu_has_bfloat16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
