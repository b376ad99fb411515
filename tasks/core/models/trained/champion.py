"""The champion: the model that is promoted, for those who use it or compare with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.core.errors import ModelLoadError, StorageError
from tasks.core.models.digests import unread_bytes, weights_sha256
from tasks.core.models.trained.alias import (
    HISTORY_NAME,
    POINTER_NAME,
    Line,
    agreed,
    locked,
    read_line,
    settled,
)
from tasks.core.run_names import PROMOTED

logger = logging.getLogger(__name__)

_LONG_READING_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Champion:
    """The promoted model; `weights_sha256` is None where a person named it by hand."""

    run_name: str
    weights_sha256: str | None = None


def current_champion(models_dir: Path) -> Champion | None:
    """The promoted model, after pointer and history were compared; None when nothing is promoted.

    A change that was decided and cut off is finished. Raises ModelLoadError when a file is damaged or missing, or
    when they disagree.
    """
    try:
        line = agreed(models_dir)
    except ModelLoadError:
        line = _agreed_after_a_change(models_dir)
    return _champion(models_dir, line)


def _agreed_after_a_change(models_dir: Path) -> Line:
    """Wait for the end of a change that is under way, or finish one that was cut off."""
    try:
        with locked(models_dir):
            return settled(models_dir)
    except StorageError:  # a folder that only others may write, or a full disk
        line = read_line(models_dir, tolerant=True)
        if not line.waits_for_pointer:
            return agreed(models_dir)
    logger.warning("%s could not be written, so %s counts", models_dir / POINTER_NAME, HISTORY_NAME)
    return replace(line, pointer=line.decided)


def _champion(models_dir: Path, line: Line) -> Champion | None:
    promotion = line.pointer
    if promotion is not None:
        digest = promotion.get("weights_sha256")
        return Champion(str(promotion["run_name"]), digest if isinstance(digest, str) else None)
    link = models_dir / PROMOTED
    if not link.is_symlink():
        return Champion(PROMOTED) if link.is_dir() else None
    target = link.resolve()
    if target.parent != models_dir.resolve():
        raise ModelLoadError(
            f"{link} is a link to {target}, which is no model in {models_dir}",
            "link it to a folder beside it, or remove it and `tuneproof promote` a model",
        )
    return Champion(target.name)


def promoted_run(models_dir: Path) -> str | None:
    """Name of the promoted run; see `current_champion`."""
    found = current_champion(models_dir)
    return None if found is None else found.run_name


def why_changed(models_dir: Path, champion: Champion) -> str | None:
    """Say that the files of the promoted model are not those that were promoted; None when they are.

    A file whose size and times are those of the last reading is not read again.
    """
    directory = models_dir / champion.run_name
    if champion.weights_sha256 is None or not directory.is_dir():
        return None
    size = unread_bytes(directory)
    if size > _LONG_READING_BYTES:
        logger.info("reading %.1f GB to see that %s is what was promoted", size / 1e9, directory)
    digest = weights_sha256(directory)
    if digest == champion.weights_sha256:
        return None
    return (
        f"the files of the promoted model {champion.run_name} have changed since it was promoted "
        f"(sha256 {champion.weights_sha256[:12]}… then, {digest[:12]}… now)"
    )


def refuse_changed(models_dir: Path, champion: Champion) -> None:
    """Raise ModelLoadError when the files of the promoted model are not those that were promoted."""
    problem = why_changed(models_dir, champion)
    if problem is not None:
        raise ModelLoadError(
            problem,
            "put its files back, go back with `tuneproof rollback`, or take them as they are: "
            f"`tuneproof promote {champion.run_name} --force --reason TEXT`",
        )
