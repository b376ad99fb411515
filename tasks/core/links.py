"""Symbolic links in a folder that is written to: none may lead out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tasks.core.errors import StorageError


def refuse_links_out(folder: Path) -> None:
    """Raise StorageError when a run's or model's folder, or anything in it, is a link that leads elsewhere.

    The folder may be a link to another one beside it, and what is above it may be links: that is for the owner of
    the settings to say. What is inside it may come from a stranger. Raises OSError when it cannot be read.
    """
    if folder.is_symlink():
        _refuse(folder, folder.parent)
    for path in _links_below(folder):
        _refuse(path, folder)


def _refuse(link: Path, root: Path) -> None:
    if not Path(os.path.realpath(link)).is_relative_to(os.path.realpath(root)):
        raise StorageError(
            f"{link} is a symbolic link that leads out of {root}, to {link.readlink()}; it is not followed for "
            "writing",
            "put a plain file or folder in its place, or use another run name",
        )


def _links_below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_symlink():
            yield Path(entry.path)
        elif entry.is_dir():
            yield from _links_below(Path(entry.path))
