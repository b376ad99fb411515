"""Memory: what counts as running out of it, how much is free, and how to give it back."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Messages of allocators that raise a plain RuntimeError (or worse) instead of a type of their own. Each stands
# in the corpus of tests/memory/test_memory.py with the place where it was seen.
_OUT_OF_MEMORY_MESSAGES = (
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "could not create a memory object",  # oneDNN, when the process's own limit is reached
    "could not execute a primitive",
    "std::bad_alloc",
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "cuda runtime error (2)",
    "triton error [cuda]: out of memory",
    "cudaerrormemoryallocation",
    "hip out of memory",
    "hip error: out of memory",
    "hiperroroutofmemory",
    "xpu out of memory",
    "mps backend out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "nvml_success == r internal assert failed",  # MIG slices, when the allocator asks for the device's state
    "out of memory trying to allocate",
    "unable to mmap",  # [Errno 12] while mapping weights
)
# oneDNN too; "could not create a primitive descriptor for …" is another failure: an operation it does not have.
_ONEDNN_PRIMITIVE = re.compile(r"could not create a primitive(?! descriptor)")


def is_out_of_memory(exc: BaseException) -> bool:
    """Tell whether `exc` means that memory ran out: by type first, then by a tested list of messages."""
    if isinstance(exc, MemoryError):
        return True
    if isinstance(exc, OSError):
        return exc.errno == 12  # ENOMEM
    torch_module = sys.modules.get("torch")  # without torch loaded no torch error can exist
    if torch_module is not None and isinstance(exc, torch_module.OutOfMemoryError):
        return True
    if not isinstance(exc, RuntimeError):
        return False
    message = str(exc).lower()
    return any(known in message for known in _OUT_OF_MEMORY_MESSAGES) or bool(
        _ONEDNN_PRIMITIVE.search(message)
    )


def forget_traceback(exc: BaseException) -> None:
    """Drop the frames an exception (and those behind it) holds: they keep the failed step's tensors alive."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        current.__traceback__ = None
        current = current.__cause__ or current.__context__


def release(device: str) -> None:
    """Collect garbage and hand cached blocks back to `device`. Call it outside of any except block."""
    gc.collect()
    if device == "cpu":
        _trim_heap()
        return
    torch_module = sys.modules.get("torch")
    if torch_module is None:
        return
    if device.startswith("cuda"):
        torch_module.cuda.empty_cache()
    elif device.startswith("mps"):
        torch_module.mps.empty_cache()


def _trim_heap() -> None:
    """Give freed blocks that malloc keeps back to the system; see malloc_trim(3), which only glibc has."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_bytes(device: str) -> int:
    """Bytes that can still be allocated on `device`; on CPU the tightest of machine, cgroup and rlimits."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.startswith("mps"):
        import torch

        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    import psutil

    return max(0, min(int(psutil.virtual_memory().available), _cgroup_free_bytes(), _rlimit_free_bytes()))


def total_bytes(device: str) -> int:
    """Bytes that `device` has in all; the key under which learned budgets are kept."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    if device.startswith("mps"):
        import torch

        return int(torch.mps.recommended_max_memory())
    import psutil

    limits = [int(psutil.virtual_memory().total), _cgroup_limit_bytes()]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def _rlimit_free_bytes() -> int:
    import psutil

    memory = psutil.Process().memory_info()
    free = sys.maxsize
    for kind, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, getattr(memory, "data", 0))):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free = min(free, soft - int(used))
    return free


def _cgroup_limit_bytes() -> int:
    return min((limit for limit, _ in _cgroup_limits()), default=sys.maxsize)


def _cgroup_free_bytes() -> int:
    return min((limit - used for limit, used in _cgroup_limits()), default=sys.maxsize)


def _cgroup_limits(
    proc_path: Path = Path("/proc/self/cgroup"), cgroup_dir: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) bytes of each memory cgroup around this process (v2 with its parents, or v1).

    The page cache that the kernel drops when memory is asked for (weights that were read, say) is not used.
    """
    pairs: list[tuple[int, int]] = []
    try:
        lines = proc_path.read_text().splitlines()
    except OSError:
        return pairs
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, names = cgroup_dir, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroup_dir / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / name.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            pair = _read_limit(place / names[0], place / names[1], place / "memory.stat", names[2])
            if pair is not None:
                pairs.append(pair)
    return pairs


def _read_limit(
    limit_path: Path, used_path: Path, statistics_path: Path, cache_name: str
) -> tuple[int, int] | None:
    try:
        limit, used = limit_path.read_text().strip(), int(used_path.read_text())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= 1 << 60:
        return None
    return int(limit), max(0, used - _statistic(statistics_path, cache_name))


def _statistic(path: Path, name: str) -> int:
    try:
        values = dict(line.split() for line in path.read_text().splitlines())
        return int(values.get(name, 0))
    except (OSError, ValueError):
        return 0


def peak_bytes(device: str) -> int:
    """Highest memory use so far, in bytes: the device's own counter, or this process's resident size."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(torch.device(device)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of key and value cache that one token takes over all layers, from the model's shape."""
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    cached_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    bytes_per_value = int(next(iter(model.parameters())).element_size())
    if bytes_per_value == 1:  # quantised weights: the cache is kept in the compute dtype
        bytes_per_value = 2
    return 2 * layers * cached_heads * head_dim * bytes_per_value
