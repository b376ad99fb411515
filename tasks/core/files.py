"""Files that are whole or absent: written to a neighbour, flushed to disk, renamed into place."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from tasks.core.errors import StorageError, first_line

# The system's number as libraries written in Rust tell it; what torch's writer says instead of it.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FAILED_STREAM = re.compile(
    r"PytorchStreamWriter|inline_container|basic_ios|iostream error|unexpected pos \d"
    r"|^Parent directory .* does not exist|^File .* cannot be opened"
)


class Inside:
    """An attribute of an object with a `path`: the path of this name within it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, place: HasPath, _kind: object = None) -> Path:
        return place.path / self._name


class HasPath(Protocol):
    """What stands for a folder."""

    @property
    def path(self) -> Path:
        """Where it is."""


def cache_dir() -> Path:
    """Directory for what can be made again: converted models, digests. TUNEPROOF_CACHE overrides it."""
    configured = os.environ.get("TUNEPROOF_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "tuneproof"


@contextmanager
def replacing(path: Path, kept: str = "") -> Iterator[Path]:
    """Give a path to write to; it replaces `path` when the block ends, and is gone when it fails.

    A reader, or a crash at any moment, sees the old file or the new one. Raises StorageError, which says what is
    `kept`, when the disk is full or the directory may not be written; the old file stays.
    """
    with _neighbour(path, kept) as partial_path:
        yield partial_path
        force_to_disk(partial_path)
        partial_path.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8) like `replacing`: whole, or not at all. Raises StorageError."""
    with replacing(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8", newline="\n")


def write_once(path: Path, text: str) -> bool:
    """Write `text` (UTF-8), whole, unless there is a file already; of several writers at once one wins.

    Returns whether it was written. Raises StorageError like `replacing`.
    """
    with _neighbour(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8", newline="\n")
        force_to_disk(partial_path)
        try:
            path.hardlink_to(partial_path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: the same, but a crash may leave part of the text
            try:
                with path.open("x", encoding="utf-8", newline="\n") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
            except FileExistsError:
                return False
    return True


@contextmanager
def _neighbour(path: Path, kept: str = "") -> Iterator[Path]:
    """Give a path beside `path` that is gone in the end, and flush the directory."""
    partial_path = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial_path
        flush_to_disk(path.parent)
    except OSError as error:
        raise storage_error(error, path, kept) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left behind
            partial_path.unlink()


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` for what is needed to write it; it is gone when the block ends."""
    folder = _temporary(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A new name beside `path` that `leftovers` knows."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def storage_error(error: OSError, path: Path, kept: str = "") -> StorageError:
    """Turn an OSError of writing `path` into one that says what to do, and what is `kept`."""
    staying = f"; {kept}" if kept else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"no space left while writing {path}", f"free some space and run the same command again{staying}"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageError(
            f"{path} cannot be written: a part of this path is a file, and a folder is needed there",
            "name another folder in the settings, or move that file away",
        )
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}",
        f"free some space or check the permissions, then run the same command again{staying}",
    )


@contextmanager
def storing(path: Path, kept: str = "") -> Iterator[None]:
    """Let libraries write to `path`, a file or folder; whatever they raise when they cannot is a StorageError then.

    It says what is `kept`. Other exceptions, those of memory that ran out too, are raised as they are.
    """
    try:
        yield
    except Exception as error:
        failed = failed_write(error)
        if failed is None:
            raise
        raise storage_error(failed, path, kept) from error


def failed_write(error: BaseException) -> OSError | None:
    """The system's error behind an exception that a library raised as it wrote; None for any other exception.

    safetensors, tokenizers and torch each raise one of their own (SafetensorError, Exception, RuntimeError).
    """
    if isinstance(error, OSError):
        found = error
    elif number := _OS_ERROR.search(str(error)):
        found = OSError(int(number[1]), os.strerror(int(number[1])))
    elif type(error).__name__ == "SafetensorError" or _FAILED_STREAM.search(str(error)):
        found = OSError(first_line(error))
    else:
        return None
    return None if found.errno == errno.ENOMEM else found


def force_to_disk(path: Path) -> None:
    """Wait until a file's content is on disk. Raises OSError where a late write failed."""
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())


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
