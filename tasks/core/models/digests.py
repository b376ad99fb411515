"""Digests of a model's files: equal digest, equal answers. Each large file is read once, then remembered."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.core.files import cache_dir, write_atomically

logger = logging.getLogger(__name__)

# Smaller files are read faster than a digest is remembered.
_REMEMBERED_BYTES = 1 << 20
WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")

# Keys that name a place, a version or a habit; all others may change an answer. dtype has its own field in
# ModelIdentity because a setting may override the checkpoint's.
_CONFIG_KEYS_WITHOUT_EFFECT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_TOKENIZER_KEYS_WITH_EFFECT = ("bos_token", "eos_token", "add_bos_token", "add_eos_token")
_ADAPTER_KEYS_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
}


def weights_sha256(path: Path) -> str:
    """sha256 (hex) over all that shapes the answers of a model directory, an adapter or one GGUF file.

    Taken in: weight files, tokenizer files, and the parts of the configuration that matter. The chat template
    and the dtype are not: both are fields of their own in ModelIdentity.
    """
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for name, content in _parts(path):
        digest.update(f"{name}={content}\n".encode())
    return digest.hexdigest()


def unread_bytes(path: Path) -> int:
    """How many bytes `weights_sha256` would have to read: those of files that are small, new or changed since."""
    paths = [path] if path.is_file() else _digested(path)
    return sum(file.stat().st_size for file in paths if _remembered(file.resolve()) is None)


def _digested(directory: Path) -> list[Path]:
    """The files whose bytes count, in the order of the digest."""
    weights = sorted(p for p in directory.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    tokenizers = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    code = sorted(directory.glob("*.py"))  # runs only when trusted, but then it may change anything
    return [*weights, *tokenizers, *code]


def _parts(directory: Path) -> list[tuple[str, str]]:
    digested = _digested(directory)
    parts = [(path.name, sha256) for path, sha256 in zip(digested, _sha256_of(digested), strict=True)]
    config = _json(directory / "config.json")
    adapter = _json(directory / "adapter_config.json")
    generation = _json(directory / "generation_config.json")
    tokenizer = _json(directory / "tokenizer_config.json")
    settings = {
        "config": {k: v for k, v in config.items() if k not in _CONFIG_KEYS_WITHOUT_EFFECT},
        "adapter": {k: _sorted(v) for k, v in adapter.items() if k not in _ADAPTER_KEYS_WITHOUT_EFFECT},
        "eos": generation.get("eos_token_id"),
        "tokenizer": {k: tokenizer.get(k) for k in _TOKENIZER_KEYS_WITH_EFFECT},
    }
    return [*parts, *((name, json.dumps(value, sort_keys=True)) for name, value in settings.items())]


def _sorted(value: Any) -> Any:
    """The library peft writes its sets of module names in an order that differs from run to run."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def _json(path: Path) -> dict[str, Any]:
    """A configuration file's keys; an absent or damaged file has none (loading it reports the damage)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces; that of a large one is remembered until the file changes."""
    return _sha256_of([path])[0]


def _sha256_of(paths: Sequence[Path]) -> list[str]:
    found: list[str] = []
    new: dict[str, Any] = {}
    try:
        for path in (path.resolve() for path in paths):
            stamp = _stamp(path)
            sha256 = _remembered(path)
            if sha256 is None:
                with path.open("rb") as stream:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                # Where it changed while we read there is nothing to remember.
                if stamp[0] >= _REMEMBERED_BYTES and _stamp(path) == stamp:
                    new[str(path)] = {"stamp": stamp, "sha256": sha256}
            found.append(sha256)
    finally:  # what was read before an interrupt too
        if new:
            _remember(_memory_path(), new)
    return found


def _memory_path() -> Path:
    return cache_dir() / "digests.json"


def _memory() -> dict[str, Any]:
    """What is remembered of thousands of files; read again only when it has changed."""
    try:
        return _read_memory(_memory_path(), *_stamp(_memory_path()))
    except OSError:
        return {}


@lru_cache(maxsize=1)
def _read_memory(memory_path: Path, *_stamp: int) -> dict[str, Any]:
    return _json(memory_path)


def _remembered(path: Path) -> str | None:
    """The digest of a large file (its resolved path) that has not changed since it was read."""
    if path.stat().st_size < _REMEMBERED_BYTES:
        return None
    known = _memory().get(str(path))
    if (
        isinstance(known, dict)
        and known.get("stamp") == _stamp(path)
        and isinstance(known.get("sha256"), str)
    ):
        return str(known["sha256"])
    return None


def _stamp(path: Path) -> list[int]:
    """What changes when a file does. The change time catches tools that set the modification time back."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remember(memory_path: Path, new: Mapping[str, Any]) -> None:
    """Add digests and forget files that are gone. A cache that cannot be written costs time only."""
    try:
        memory_path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memory_path}.lock"):
            known = {name: entry for name, entry in _json(memory_path).items() if Path(name).exists()}
            # Without an indent, which only the encoder in Python can write.
            write_atomically(memory_path, json.dumps({**known, **new}, sort_keys=True))
    except Exception as error:  # StorageError, a read-only home, a file system without locks
        logger.debug("digests of %s not remembered: %s", ", ".join(new), error)
