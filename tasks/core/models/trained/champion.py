"""The champion: the model that is promoted, for those who use it or compare with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.core.errors import ModelLoadError, StorageError
from tasks.core.models.digests import unread_bytes, weights_sha256
from tasks.core.models.trained.alias import (
    Line,
    agreed,
    alias_files,
    locked,
    read_line,
    settled,
)
from tasks.core.models.trained.alias_files import HISTORY_NAME, POINTER_NAME
from tasks.core.models.trained.folders import folder_of
from tasks.core.run_names import PROMOTED
from tasks.core.storage.store import Store, as_store

logger = logging.getLogger(__name__)

_LONG_READING_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Champion:
    """The promoted model; `weights_sha256` is None where a person named it by hand."""

    run_name: str
    weights_sha256: str | None = None


def current_champion(models: Store | Path) -> Champion | None:
    """The promoted model, after pointer and history were compared; None when nothing is promoted.

    A change that was decided and cut off is finished. Raises ModelLoadError when a file is damaged or missing, or
    when they disagree.
    """
    try:
        line = agreed(models)
    except ModelLoadError:
        line = _agreed_after_a_change(models)
    return champion_in(models, line)


def _agreed_after_a_change(models: Store | Path) -> Line:
    """Wait for the end of a change that is under way, or finish one that was cut off."""
    try:
        with locked(models):
            return settled(models)
    except StorageError:  # a folder that only others may write, or a full disk
        line = read_line(models, tolerant=True)
        if not line.waits_for_pointer:
            return agreed(models)
    address = alias_files(models).address(POINTER_NAME)
    logger.warning("%s could not be written, so %s counts", address, HISTORY_NAME)
    return replace(line, pointer=line.decided)


def champion_in(models: Store | Path, line: Line) -> Champion | None:
    """The champion that an agreed line names, or a link made by a person; None when there is none."""
    promotion = line.pointer
    if promotion is not None:
        digest = promotion.get("weights_sha256")
        return Champion(str(promotion["run_name"]), digest if isinstance(digest, str) else None)
    link = alias_files(models).has_link()
    if link is None or not link.is_symlink():
        return None if link is None else Champion(PROMOTED)
    target = link.resolve()
    if target.parent != as_store(models).local.resolve():
        raise ModelLoadError(
            f"{link} is a link to {target}, which is no model in {as_store(models).place}",
            "link it to a folder beside it, or remove it and `tuneproof promote` a model",
        )
    return Champion(target.name)


def promoted_run(models: Store | Path) -> str | None:
    """Name of the promoted run; see `current_champion`."""
    found = current_champion(models)
    return None if found is None else found.run_name


def why_changed(models: Store | Path, champion: Champion) -> str | None:
    """Say that the files of the promoted model are not those that were promoted; None when they are.

    A file whose size and times are those of the last reading is not read again.
    """
    if champion.weights_sha256 is None:
        return None
    directory = folder_of(models, champion.run_name)
    if not directory.is_dir():
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


def refuse_changed(models: Store | Path, champion: Champion) -> None:
    """Raise ModelLoadError when the files of the promoted model are not those that were promoted."""
    problem = why_changed(models, champion)
    if problem is not None:
        raise ModelLoadError(
            problem,
            "put its files back, go back with `tuneproof rollback`, or take them as they are: "
            f"`tuneproof promote {champion.run_name} --force --reason TEXT`",
        )
