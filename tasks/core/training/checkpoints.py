"""Checkpoints that are whole or ignored: a seal, written last, lists what belongs to one."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tasks.core.errors import StorageError, first_line
from tasks.core.files import flush_to_disk, write_atomically
from tasks.core.generation.memory import is_out_of_memory

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_SEAL_NAME = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint_dir: Path, seconds: float) -> None:
    """Mark a checkpoint as whole: flush its files, then list their sizes and the seconds trained so far."""
    paths = [path for path in sorted(checkpoint_dir.iterdir()) if path.is_file() and path.name != _SEAL_NAME]
    for path in paths:
        flush_to_disk(path)
    sizes = {path.name: path.stat().st_size for path in paths}
    content = {"seconds": round(seconds, 3), "file_bytes": sizes}
    write_atomically(checkpoint_dir / _SEAL_NAME, json.dumps(content, indent=2))


def unseal(checkpoint_dir: Path) -> None:
    """A checkpoint that is about to be written (again) is not whole."""
    (checkpoint_dir / _SEAL_NAME).unlink(missing_ok=True)


def is_whole(checkpoint_dir: Path) -> bool:
    """Tell whether a checkpoint was finished and still has all its files in full size."""
    try:
        sizes = _read_seal(checkpoint_dir)["file_bytes"]
        return all((checkpoint_dir / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def seconds_of(checkpoint_dir: Path) -> float:
    """Seconds of training that led to a whole checkpoint, over all sessions."""
    return float(_read_seal(checkpoint_dir)["seconds"])


def step_of(checkpoint_dir: Path) -> int:
    """The optimizer step a checkpoint was taken at."""
    match = _NAME.fullmatch(checkpoint_dir.name)
    return int(match[1]) if match else -1


def newest_whole(checkpoints_dir: Path) -> Path | None:
    """The checkpoint to resume from; incomplete ones are passed over and named in the log."""
    for checkpoint_dir in reversed(_all(checkpoints_dir)):
        if is_whole(checkpoint_dir):
            return checkpoint_dir
        logger.warning(
            "%s is incomplete (training was interrupted while writing it); ignored", checkpoint_dir
        )
    return None


def rotate(checkpoints_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and all incomplete ones."""
    found = _all(checkpoints_dir)
    kept = [path for path in found if is_whole(path)][-keep:]
    for checkpoint_dir in found:
        if checkpoint_dir not in kept:
            shutil.rmtree(checkpoint_dir, ignore_errors=True)


def remove_all(checkpoints_dir: Path) -> None:
    """Forget an unfinished training."""
    for checkpoint_dir in _all(checkpoints_dir):
        shutil.rmtree(checkpoint_dir, ignore_errors=True)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the model libraries raise on a full or read-only disk into StorageError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        torch_failed = "PytorchStreamWriter" in str(error) or "enforce fail at inline_container" in str(error)
        if is_out_of_memory(error) or (isinstance(error, RuntimeError) and not torch_failed):
            raise
        raise StorageError(
            f"{path} could not be written: {first_line(error)}",
            "free some space, then run the same command again: it goes on from the newest whole checkpoint",
        ) from error


def _read_seal(checkpoint_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint_dir / _SEAL_NAME).read_text(encoding="utf-8"))
    return content


def _all(checkpoints_dir: Path) -> list[Path]:
    if not checkpoints_dir.is_dir():
        return []
    return sorted((path for path in checkpoints_dir.iterdir() if _NAME.fullmatch(path.name)), key=step_of)
