"""Files that are whole or absent: written to a neighbour, flushed to disk, renamed into place."""

from __future__ import annotations

import os
import secrets
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with partial_path.open("x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            partial_path.replace(path)
        except BaseException:
            partial_path.unlink(missing_ok=True)
            raise
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
