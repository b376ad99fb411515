"""Which models were found to answer rightly with packed attention, by shape and versions, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from tasks.core.errors import StorageError
from tasks.core.files import cache_dir, write_atomically
from tasks.core.provenance import library_version

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate")
_MOST_ENTRIES = 200
_LOCK_SECONDS = 5


def probe_key(model: LoadedModel) -> str | None:
    """Hash of all that decides how a model computes, without its weights; None where that is not known.

    It is not known of code that comes with a model or wraps it. Everything else is in the configuration, the names and
    shapes of the tensors, dtype and quantisation, the device, and the versions of the libraries and of our engines.
    Weights are left out: packed and plain attention do the same sums on the same numbers in another order, so whether
    they agree is a question of the layers, and what differs with the weights is rounding; that the weights give numbers
    at all is asked of them each time. Only agreement is remembered, so a model that was refused is tried, and its
    reason told, each time.
    """
    inner = model.model
    if not type(inner).__module__.startswith("transformers."):
        return None
    tensors = [*inner.named_parameters(), *inner.named_buffers()]
    # A quantised layer is another class, and so is one that somebody put in the place of a library's.
    layers = sorted({f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in inner.modules()})
    config = {
        name: value
        for name, value in inner.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    decisive = {
        "config": config,
        "attention": str(getattr(inner.config, "_attn_implementation", None)),
        "layers": layers,
        "tensors": [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors],
        "dtype": model.identity.dtype,
        "quantization": model.identity.quantization,
        "machine": _machine(str(model.device)),
        "versions": {name: library_version(name) for name in _LIBRARIES},
        "engines": _engines_sha256(),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def is_remembered(key: str | None) -> bool:
    """Whether a model of this key was found to answer rightly; a damaged or unreadable file remembers nothing."""
    return key is not None and key in _read(_path())


def remember(key: str | None) -> None:
    """Keep that a model of this key answers rightly; a cache that cannot be written keeps nothing."""
    if key is None:
        return
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            known = {**_read(path), key: int(time.time())}
            newest = sorted(known, key=known.__getitem__)[-_MOST_ENTRIES:]
            write_atomically(path, json.dumps({name: known[name] for name in newest}, indent=1))
    except (OSError, StorageError, Timeout) as error:
        logger.debug("that the model answers rightly in flight could not be kept in %s: %s", path, error)


def _path() -> Path:
    return cache_dir() / "inflight_probes.json"


def _read(path: Path) -> dict[str, int]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {name: at for name, at in stored.items() if isinstance(at, int)}


def _machine(device: str) -> tuple[str, ...]:
    """What kernels depend on: the processor and what it computes in, or the GPU."""
    import torch

    processor = (platform.machine(), torch.backends.cpu.get_cpu_capability())
    if not device.startswith("cuda"):
        return (device.partition(":")[0], *processor)
    return (torch.cuda.get_device_name(device), str(torch.version.cuda), *processor)


@cache
def _engines_sha256() -> str:
    """Digest of our code that is tried here: in a checkout it changes without its version."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
