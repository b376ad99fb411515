"""What the processor can do with bfloat16, and how many cores there are; everything that depends on it asks here.

The answers follow `ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY`, which hide instructions from PyTorch's kernels, so
that one machine can stand for another.
"""

from __future__ import annotations

import os
from typing import Any

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
"""torch's names of instructions that multiply in bfloat16."""
_X86_WITHOUT_BFLOAT16 = ("DEFAULT", "NO AVX", "AVX2")
"""Kernels of torch for x86 that use no such instructions, whatever the processor has."""


def computes_in_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 here: the processor has instructions for them."""
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities:  # older PyTorch
        return prepares_bfloat16()
    has = any(capabilities.get(name, False) for name in _BFLOAT16)
    # What is built into the processor is told even where it is hidden; what the kernels use is not.
    if capabilities.get("architecture") == "x86_64":
        has = has and torch.backends.cpu.get_cpu_capability() not in _X86_WITHOUT_BFLOAT16
    return has and (prepares_bfloat16() or not torch._C._has_mkldnn)


def prepares_bfloat16() -> bool:
    """Whether oneDNN lays out weights in bfloat16 beforehand here, with instructions of its own or by emulation."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepares_weights() -> bool:
    """Whether oneDNN and the operations that take prepared weights are there."""
    import torch

    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def cpu_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def share_cores(processes: int) -> None:
    """Give this process its share of the cores for torch, unless OMP_NUM_THREADS says how many."""
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, cpu_cores() // processes))
