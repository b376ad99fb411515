"""What counts as running out of memory, and what must not."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks.core.memory.device_memory import _cgroup_limits, free_bytes, is_out_of_memory, total_bytes

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"
    ),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a primitive: out of memory"),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not execute a primitive"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("cuda runtime error (2) : out of memory at ../aten/src/THC/THCCachingHostAllocator.cpp:278"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.88 GB, max allowed: 9.07 GB)"),
    RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
    RuntimeError(
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED at '../c10/cuda/CUDACachingAllocator.cpp':1131, please report a bug"
    ),
    OSError(12, "Cannot allocate memory"),
]
NEAR_MISSES = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError(
        "could not create a primitive descriptor for the matmul primitive. Run workload with environment variable "
        "ONEDNN_VERBOSE=all to get additional diagnostic information."
    ),
    RuntimeError(
        "cuda runtime error (59) : device-side assert triggered at ../aten/src/THC/THCReduceAll.cuh:327"
    ),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
    RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("pin memory thread exited unexpectedly"),
    RuntimeError("the model is out of date; memory of it is gone"),
    ValueError("CUDA out of memory"),
    KeyError("out of memory"),
    OSError(28, "No space left on device"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("exc", OUT_OF_MEMORY, ids=lambda exc: str(exc)[:40])
def test_running_out_of_memory_is_recognised(exc: BaseException) -> None:
    assert is_out_of_memory(exc)


@pytest.mark.parametrize("exc", NEAR_MISSES, ids=lambda exc: str(exc)[:40])
def test_other_errors_are_not_taken_for_it(exc: BaseException) -> None:
    assert not is_out_of_memory(exc)


def test_a_real_allocation_failure_of_torch_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_free_memory_respects_a_limit_on_the_process() -> None:
    script = (
        "import resource, psutil\n"
        "from tasks.core.memory.device_memory import free_bytes, total_bytes\n"
        "used = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))\n"
        "print(free_bytes('cpu'), total_bytes('cpu'), used + 2**28)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    free, total, limit = map(int, run.stdout.split())
    assert 0 < free <= 2**28
    assert total == limit


@pytest.mark.parametrize(
    ("line", "limit", "used", "cache"),
    [
        ("0::/tuneproof", "memory.max", "memory.current", "inactive_file"),
        ("5:cpu,memory:/tuneproof", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_page_cache_that_can_be_dropped_is_free(
    tmp_path: Path, line: str, limit: str, used: str, cache: str
) -> None:
    group = tmp_path / ("memory/tuneproof" if "memory" in line else "tuneproof")
    group.mkdir(parents=True)
    (tmp_path / "self").write_text(line + "\n")
    (group / limit).write_text("8000\n")
    (group / used).write_text("7000\n")
    assert _cgroup_limits(tmp_path / "self", tmp_path) == [(8000, 7000)]
    (group / "memory.stat").write_text(f"anon 1000\n{cache} 5500\nactive_file 500\n")
    assert _cgroup_limits(tmp_path / "self", tmp_path) == [(8000, 1500)]


def test_free_memory_is_below_total() -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert 0 < free_bytes("cpu") < total_bytes("cpu")
