"""Files that are whole or absent: written to a neighbour, flushed to disk, renamed into place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from tasks.core.errors import StorageError


def cache_dir() -> Path:
    """Directory for what can be made again: converted models, digests. TUNEPROOF_CACHE overrides it."""
    configured = os.environ.get("TUNEPROOF_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "tuneproof"


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8) so that a reader, or a crash at any moment, sees the old file or the new one.

    Raises StorageError when the disk is full or the directory may not be written; the old file stays.
    """
    _write_whole(path, text, lambda partial_path: partial_path.replace(path))


def write_once(path: Path, text: str) -> bool:
    """Write `text` (UTF-8), whole, unless there is a file already; of several writers at once one wins.

    Returns whether it was written. Raises StorageError like `write_atomically`.
    """
    written = True

    def put(partial_path: Path) -> None:
        nonlocal written
        try:
            path.hardlink_to(partial_path)
        except FileExistsError:
            written = False
        except OSError:  # a file system without hard links: the same, but a crash may leave part of the text
            try:
                with path.open("x", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
            except FileExistsError:
                written = False

    _write_whole(path, text, put)
    return written


def _write_whole(path: Path, text: str, put: Callable[[Path], object]) -> None:
    """Write `text` to a neighbour of `path`, let `put` bring that into place, and remove what is left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with partial_path.open("x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            put(partial_path)
        finally:
            partial_path.unlink(missing_ok=True)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}",
            "free some space or check the permissions of the directory, then run the same command again",
        ) from error


def flush_to_disk(path: Path) -> None:
    """Ask the system to put a file or a directory's entries on disk; does nothing where it cannot."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open directories
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(descriptor)


def exists(path: Path) -> bool:
    """Tell whether a file or folder is there; a name longer than the file system allows is not."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Tell whether a folder is there; a name longer than the file system allows is not."""
    try:
        return path.is_dir()
    except OSError:
        return False
