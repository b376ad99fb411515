"""On which device a model computes, and in how many bits its weights lie there."""

from __future__ import annotations

import importlib
import logging
from typing import Any, Literal

from tasks.core.errors import ModelLoadError
from tasks.core.memory.processor import computes_in_bfloat16

logger = logging.getLogger(__name__)

Quantization = Literal["none", "4bit", "8bit"]


def available_devices() -> list[str]:
    """Devices of this machine, best first: cuda:0, cuda:1, …, mps, cpu."""
    import torch

    cuda = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def choose_device(wanted: str) -> str:
    """Resolve `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; ModelLoadError lists what there is instead."""
    there = available_devices()
    if wanted == "auto":
        return there[0]
    resolved = "cuda:0" if wanted == "cuda" else wanted
    if resolved not in there:
        hint = ""
        if resolved.startswith("cuda") and there[0] == "cpu":
            import torch

            built_for = torch.version.cuda
            hint = (
                f" (this PyTorch is {'a CPU build' if built_for is None else f'built for CUDA {built_for}'})"
            )
        raise ModelLoadError(
            f"device {wanted!r} is not on this machine; there is: {', '.join(there)}{hint}",
            'set device = "auto" or one of these; docs/gpu-4bit.md tells how to install PyTorch for a GPU',
        )
    return resolved


def answering_dtype(stored: str, device: str) -> str:
    """The number format to answer in on `device` (which may be `auto`) by weights stored in `stored`.

    On a processor without bfloat16 arithmetic 16 bits are emulated, three times as slowly as float32, and each
    answer of float32 is that of the row alone. Elsewhere it is the stored one. As training does, see precision.py.
    """
    if stored not in ("bfloat16", "float16") or device not in ("auto", "cpu"):
        return stored
    on_cpu = device == "cpu" or choose_device("auto") == "cpu"
    return "float32" if on_cpu and not computes_in_bfloat16() else stored


def device_map(wanted: str, device: str, weight_bytes: int) -> dict[str, str] | str | None:
    """What transformers' `device_map` should be; None loads on the CPU without accelerate.

    One device takes the whole model. Only with `auto`, several GPUs and weights (in bytes, as they will lie in
    memory) that one of them cannot hold does accelerate spread the layers over all.
    """
    if device == "cpu":
        return None
    if wanted == "auto" and device.startswith("cuda"):
        import torch

        free_bytes, _ = torch.cuda.mem_get_info(device)
        if torch.cuda.device_count() > 1 and weight_bytes > 0.9 * free_bytes:
            logger.info("weights of %.1f GB do not fit on %s; using all GPUs", weight_bytes / 1e9, device)
            return "auto"
    return {"": device}


def quantization_config(quantization: Quantization, compute_dtype: Any) -> Any:
    """Settings for bitsandbytes: nf4 with double quantisation, or LLM.int8(); None for no quantisation."""
    if quantization == "none":
        return None
    _require_bitsandbytes(quantization)
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _require_bitsandbytes(quantization: Quantization) -> None:
    advice = 'pip install "bitsandbytes>=0.49", or set load_in_4bit = false and load_in_8bit = false'
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # absent, or its native library does not fit this machine
        absent = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        problem = "is not installed" if absent else f"does not start: {error}"
        raise ModelLoadError(
            f"{quantization} loading needs the package bitsandbytes, which {problem}", advice
        ) from error
