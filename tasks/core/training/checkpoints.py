"""Checkpoints that are whole or ignored: a seal, written last, lists what belongs to one."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.core import files
from tasks.core.files import force_to_disk, write_atomically
from tasks.core.training.validation import best_validation

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SEAL_NAME = "complete.json"
_STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint_dir: Path, seconds: float) -> None:
    """Mark a checkpoint as whole: flush its files, then list their sizes, sums and the seconds trained so far.

    Sums are taken of all of them: another optimizer's state, or another order of rows, trains other weights.
    """
    paths = [path for path in sorted(checkpoint_dir.iterdir()) if path.is_file() and path.name != SEAL_NAME]
    for path in paths:
        force_to_disk(path)
    sizes = {path.name: path.stat().st_size for path in paths}
    sums = {path.name: _sha256(path) for path in paths}
    content = {"seconds": round(seconds, 3), "file_bytes": sizes, "file_sha256": sums}
    write_atomically(checkpoint_dir / SEAL_NAME, json.dumps(content, indent=2))


def unseal(checkpoint_dir: Path) -> None:
    """A checkpoint that is about to be written (again) is not whole."""
    (checkpoint_dir / SEAL_NAME).unlink(missing_ok=True)


def is_whole(checkpoint_dir: Path) -> bool:
    """Tell whether a checkpoint was finished and still has all its files in full size."""
    try:
        sizes = _read_seal(checkpoint_dir)["file_bytes"]
        return all((checkpoint_dir / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def is_intact(checkpoint_dir: Path) -> bool:
    """Tell whether a checkpoint is whole and its files are byte by byte those that were written."""
    if not is_whole(checkpoint_dir):
        return False
    sums = _read_seal(checkpoint_dir).get("file_sha256", {})  # older versions sealed sizes, or sums of some
    return all(_sha256(checkpoint_dir / name) == expected for name, expected in sums.items())


def file_bytes(checkpoint_dir: Path) -> dict[str, int]:
    """Names and sizes of the files that a sealed checkpoint is made of."""
    sizes: dict[str, int] = _read_seal(checkpoint_dir)["file_bytes"]
    return sizes


def seconds_of(checkpoint_dir: Path) -> float:
    """Seconds of training that led to a whole checkpoint, over all sessions."""
    return float(_read_seal(checkpoint_dir)["seconds"])


def step_of(checkpoint_dir: Path) -> int:
    """The optimizer step a checkpoint was taken at."""
    match = _NAME.fullmatch(checkpoint_dir.name)
    return int(match[1]) if match else -1


def at_step(checkpoints_dir: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step is, if there is one."""
    return checkpoints_dir / f"checkpoint-{step}"


def newest_whole(checkpoints_dir: Path) -> Path | None:
    """The newest whole checkpoint; incomplete ones are passed over and named in the log."""
    return next(_whole(checkpoints_dir), None)


def all_whole(checkpoints_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; others may be being written."""
    return [path for path in _all(checkpoints_dir) if is_whole(path)]


def resume_point(checkpoints_dir: Path) -> Path | None:
    """The checkpoint to resume from: the newest that is intact and whose best checkpoint so far is intact too.

    Without the best one, a resumed training could not give the weights of an undisturbed one; from an older
    checkpoint, or from the start, it is trained again. Checkpoints after the one that is given are removed.
    """
    found = list(_whole(checkpoints_dir))
    for checkpoint_dir in found:
        damaged = _damaged_part(checkpoint_dir)
        if damaged is None:
            remove_all(checkpoints_dir, after_step=step_of(checkpoint_dir))
            return checkpoint_dir
        logger.warning(
            "%s is not gone on from: %s is damaged or gone; what it held is trained again",
            *(checkpoint_dir, damaged),
        )
    remove_all(checkpoints_dir)
    return None


def read_log(checkpoint_dir: Path) -> list[dict[str, Any]]:
    """The losses up to a whole checkpoint, as transformers' trainer writes them."""
    state = json.loads((checkpoint_dir / _STATE_NAME).read_text(encoding="utf-8"))
    log: list[dict[str, Any]] = state["log_history"]
    return log


def rotate(checkpoints_dir: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best one, and all incomplete ones."""
    found = _all(checkpoints_dir)
    whole = [path for path in found if is_whole(path)]
    kept = [*whole[-keep:], *(path for path in whole if step_of(path) == best_step)]
    for checkpoint_dir in found:
        if checkpoint_dir not in kept:
            shutil.rmtree(checkpoint_dir, ignore_errors=True)


def remove(checkpoint_dir: Path) -> None:
    """Forget one checkpoint."""
    shutil.rmtree(checkpoint_dir, ignore_errors=True)


def remove_all(checkpoints_dir: Path, *, after_step: int = -1) -> None:
    """Forget an unfinished training, or what it did after a step."""
    for checkpoint_dir in _all(checkpoints_dir):
        if step_of(checkpoint_dir) > after_step:
            shutil.rmtree(checkpoint_dir, ignore_errors=True)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn whatever the model libraries raise where the disk takes nothing into StorageError."""
    with files.storing(path, "it goes on from the newest whole checkpoint"):
        yield


def _read_seal(checkpoint_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint_dir / SEAL_NAME).read_text(encoding="utf-8"))
    return content


def _whole(checkpoints_dir: Path) -> Iterator[Path]:
    """Whole checkpoints, the newest first."""
    for checkpoint_dir in reversed(_all(checkpoints_dir)):
        if is_whole(checkpoint_dir):
            yield checkpoint_dir
        else:
            logger.warning(
                "%s is incomplete (training was interrupted while writing it); ignored", checkpoint_dir
            )


def _damaged_part(checkpoint_dir: Path) -> str | None:
    """What a training that goes on from this checkpoint would miss: its own weights, or those of the best so far."""
    if not is_intact(checkpoint_dir):
        return checkpoint_dir.name
    best = best_validation(read_log(checkpoint_dir))
    if best is None or best.step == step_of(checkpoint_dir):
        return None
    best_dir = at_step(checkpoint_dir.parent, best.step)
    return None if is_intact(best_dir) else f"the best checkpoint, {best_dir.name},"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all(checkpoints_dir: Path) -> list[Path]:
    if not checkpoints_dir.is_dir():
        return []
    return sorted((path for path in checkpoints_dir.iterdir() if _NAME.fullmatch(path.name)), key=step_of)
