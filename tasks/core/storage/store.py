"""Directories of runs and models on this disk or at a URL: a URL has a mirror on this disk, where all work is done.

Any file system of fsspec serves (`s3://`, `gs://`, `file://`, …). Reading and writing happen in the mirror; `pull`
brings what is newer at the URL, `push` sends files there. Nothing is mounted and no file is changed in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tasks.core.errors import StorageError
from tasks.core.files import cache_dir, replacing, storage_error, write_atomically

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

_STAMPS = ".stamps.json"
# Small files are noted together, since each note is forced to the disk.
_NOTE_SECONDS = 1.0


def is_url(place: str | Path) -> bool:
    """Tell whether a place is a URL (`scheme://…`) and not a path."""
    return "://" in str(place)


@dataclass(frozen=True, slots=True)
class Store:
    """A directory, given as a path or a URL. For a path `local` is that path and pull and push do nothing."""

    place: str

    @property
    def is_remote(self) -> bool:
        """Whether the directory is at a URL."""
        return is_url(self.place)

    @property
    def local(self) -> Path:
        """Where the files are read and written: the path itself, or the URL's mirror in the cache."""
        if not self.is_remote:
            return Path(self.place)
        address = self.place.rstrip("/")
        digest = hashlib.sha256(address.encode()).hexdigest()[:12]
        return cache_dir() / "mirrors" / f"{posixpath.basename(address)}-{digest}"

    def url_of(self, path: Path) -> str:
        """Return how other machines name a file or directory of this one: its URL, or its absolute path."""
        if not self.is_remote or not path.is_relative_to(self.local):
            return str(path.resolve())
        return posixpath.join(self.place, path.relative_to(self.local).as_posix())

    def address_of(self, name: str) -> str:
        """Return the path or URL of what lies directly in the directory, as a person would write it."""
        return posixpath.join(self.place, name) if self.is_remote else str(self.local / name)

    def names(self) -> list[str]:
        """Names of the directories directly below, sorted; [] where there is nothing."""
        if not self.is_remote:
            found = self.local.iterdir() if self.local.is_dir() else ()
            return sorted(path.name for path in found if path.is_dir())
        return self.names_below("")

    def names_below(self, below: str) -> list[str]:
        """Names of the directories directly below a directory at the URL, sorted."""
        return self._names(below, "directory")

    def files_below(self, below: str) -> list[str]:
        """Names of the files directly below a directory at the URL, sorted."""
        return self._names(below, "file")

    def _names(self, below: str, kind: str) -> list[str]:
        with explained(self.place, "listed"):
            files, root = open_place(self.place)
            start = posixpath.join(root, below) if below else root
            try:
                entries = [entry for entry in files.ls(start, detail=True) if entry["type"] == kind]
            except FileNotFoundError:
                return []
            names = {posixpath.basename(entry["name"].rstrip("/")) for entry in entries}
            return sorted(names - {posixpath.basename(start)} if kind == "file" else names)

    def pull(
        self,
        below: str = "",
        *,
        only: Iterable[str] | None = None,
        leave_out: str | tuple[str, ...] = "",
        forgets: bool = False,
    ) -> None:
        """Bring all files below a directory that are new or changed there; `only` names some of them.

        Names that begin with `leave_out` stay there. A file is whole or absent in the mirror too. With `forgets`
        copies of files that are gone there are removed here; what was never sent stays. Raises StorageError.
        """
        if not self.is_remote:
            return
        with self._read():
            files, root = open_place(self.place)
            start = posixpath.join(root, below) if below else root
            if only is None:
                found = _listed(files, start)
            else:
                found = _found(files, [posixpath.join(start, name) for name in only])
            relative = _relative(files, root, found)
            staying = leave_out if isinstance(leave_out, tuple) else (leave_out,) if leave_out else ()
            self._fetch(files, root, {n: info for n, info in relative.items() if not n.startswith(staying)})
            if forgets:
                self._forget(below, relative, staying)

    def _forget(self, below: str, there: dict[str, dict[str, Any]], staying: tuple[str, ...]) -> None:
        start = f"{below}/" if below else ""
        for name in self._stamps():
            if name.startswith(start) and name not in there and not name.startswith(staying):
                (self.local / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            (self.local / below).rmdir()

    def pull_each(self, *names: str) -> dict[str, int]:
        """Bring the files of these names from every directory directly below, by one listing.

        Returns name and size of every file there. Raises StorageError.
        """
        if not self.is_remote:
            return {}
        with self._read():
            files, root = open_place(self.place)
            relative = _relative(files, root, _listed(files, root))
            wanted = {n: i for n, i in relative.items() if n.count("/") == 1 and n.partition("/")[2] in names}
            self._fetch(files, root, wanted)
            return {name: int(info["size"]) for name, info in relative.items()}

    def _fetch(self, files: AbstractFileSystem, root: str, infos: dict[str, dict[str, Any]]) -> None:
        stamps, brought, noted = self._stamps(), dict[str, str](), time.monotonic()
        try:
            for name, info in infos.items():
                if self._holds(name, info, stamps):
                    continue
                with self._fetching(name):
                    if self._holds(name, info, self._stamps()):  # another process has brought it meanwhile
                        continue
                    with replacing(self.local / name) as partial_path, self._read():
                        files.get_file(posixpath.join(root, name), str(partial_path))
                    brought[name] = _stamp(info)
                    if time.monotonic() - noted > _NOTE_SECONDS:  # whoever waits for a large file must see it
                        self._remember(brought)
                        brought, noted = {}, time.monotonic()
        finally:
            self._remember(brought)

    def _holds(self, name: str, info: dict[str, Any], stamps: dict[str, str]) -> bool:
        """Whether the mirror has this version of a file."""
        path = self.local / name
        whole = path.is_file() and path.stat().st_size == info["size"]
        return whole and stamps.get(name) == _stamp(info)

    @contextmanager
    def _fetching(self, name: str) -> Iterator[None]:
        """Let one process of this machine bring a file, while the others that want it wait."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        lock_path = self.local.parent / ".locks" / f"{self.local.name}-{digest}.lock"
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_path):
            yield

    def push(self, paths: Iterable[Path]) -> None:
        """Send files of the mirror, in the given order; those that do not exist are left out.

        Raises StorageError; what was sent before stays there.
        """
        if not self.is_remote:
            return
        with explained(self.place, "written"):
            files, root = open_place(self.place)
            news = {}
            for path in paths:
                if not path.is_file():
                    continue
                name = path.relative_to(self.local).as_posix()
                address = posixpath.join(root, name)
                _in_folder(files, address, partial(files.put_file, str(path), address))
                files.invalidate_cache(posixpath.dirname(address))
                news[name] = _stamp(files.info(address))
            self._remember(news)

    def read(self, name: str) -> bytes | None:
        """Return a small file's content as it is there now, or None. Raises StorageError."""
        if not self.is_remote:
            path = self.local / name
            return path.read_bytes() if path.is_file() else None
        with self._read():
            files, root = open_place(self.place)
            try:
                content: bytes = files.cat_file(posixpath.join(root, name))
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file there, not in the mirror. Raises StorageError."""
        with explained(self.place, "written"):
            files, root = open_place(self.place)
            write_whole(files, posixpath.join(root, name), content)

    def write_once(self, name: str, content: bytes) -> bool:
        """Write a small file there unless there is one; return whether it was written. Raises StorageError.

        Of several machines at once one wins, where the file system can tell; S3 can.
        """
        with explained(self.place, "written"):
            files, root = open_place(self.place)
            address = posixpath.join(root, name)
            if files.exists(address):
                return False
            try:
                _in_folder(files, address, partial(files.pipe_file, address, content, mode="create"))
            except Exception:  # another one was first, or it cannot be written under that condition
                files.invalidate_cache()
                if files.exists(address):
                    return False
                files.pipe_file(address, content)
            return True

    def remove(self, name: str) -> None:
        """Remove a file there, if it is there. Raises StorageError."""
        with explained(self.place, "written"):
            files, root = open_place(self.place)
            try:
                files.rm_file(posixpath.join(root, name))
            except FileNotFoundError:
                return

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files there, in one request where the store can. Raises StorageError."""
        with explained(self.place, "written"):
            files, root = open_place(self.place)
            if addresses := [posixpath.join(root, name) for name in names]:
                with suppress(FileNotFoundError):
                    files.rm(addresses)
            if "file" in files.protocol:  # a file system keeps the folders of what is gone
                for folder in {posixpath.dirname(address) for address in addresses}:
                    with suppress(OSError):
                        files.rmdir(folder)

    def has(self, name: str) -> bool:
        """Tell whether there is a directory of this name directly below. Raises StorageError."""
        return name in self.names() if self.is_remote else (self.local / name).is_dir()

    def there(self, below: str) -> dict[str, int]:
        """Names (relative to the place) and sizes of all files below a directory at the URL. Raises StorageError."""
        with self._read():
            files, root = open_place(self.place)
            found = _relative(files, root, _listed(files, posixpath.join(root, below)))
            return {name: int(info["size"]) for name, info in found.items()}

    def _read(self) -> AbstractContextManager[None]:
        return explained(self.place, "read")

    def _stamps(self) -> dict[str, str]:
        try:
            stamps = json.loads((self.local / _STAMPS).read_text())
        except (OSError, ValueError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def _remember(self, news: dict[str, str]) -> None:
        """Note which version of each file the mirror holds."""
        if not news:
            return
        self.local.mkdir(parents=True, exist_ok=True)
        with FileLock(self.local / f"{_STAMPS}.lock"):
            write_atomically(self.local / _STAMPS, json.dumps({**self._stamps(), **news}, sort_keys=True))


def local_copy(place: str) -> Path:
    """Return the path of a model's directory or file, brought here first when it is a URL; no checkpoints.

    Raises StorageError, also when there is nothing at the URL.
    """
    if not is_url(place):
        return Path(place)
    parent, _, name = place.rstrip("/").rpartition("/")
    store = Store(parent)
    store.pull(name, leave_out=f"{name}/checkpoints/")
    if not (store.local / name).exists():
        raise StorageError(f"there is nothing at {place}", "check the address and the credentials")
    return store.local / name


def open_place(place: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    files, root = fsspec.core.url_to_fs(place)
    files.invalidate_cache()  # another machine may have written since
    return files, root


def write_whole(files: AbstractFileSystem, address: str, content: bytes) -> None:
    """Write a small file whole or not at all, also where the file system is this machine's."""
    if "file" in _protocols(files):
        files.makedirs(posixpath.dirname(address), exist_ok=True)
        with replacing(Path(address)) as partial_path:
            partial_path.write_bytes(content)
    else:
        _in_folder(files, address, partial(files.pipe_file, address, content))


def _in_folder(files: AbstractFileSystem, address: str, write: Callable[[], Any]) -> None:
    """Write a file, whose folder is made before; S3 has none, and only a bucket that is missing is made."""
    if speaks_s3(files):
        with suppress(FileNotFoundError):
            write()
            return
    files.makedirs(posixpath.dirname(address), exist_ok=True)
    write()


def speaks_s3(files: AbstractFileSystem) -> bool:
    """Whether a file system is S3's, by the client whose requests are known here."""
    return "s3" in _protocols(files) and hasattr(files, "_call_s3")


def _protocols(files: AbstractFileSystem) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else files.protocol


def as_store(place: Store | Path) -> Store:
    """A place of models or runs, given as a folder's path or as the store that it is."""
    return Store(str(place)) if isinstance(place, Path) else place


def _listed(files: AbstractFileSystem, start: str) -> dict[str, dict[str, Any]]:
    """All files below a directory, by address."""
    try:
        found: dict[str, dict[str, Any]] = files.find(start, detail=True)
    except FileNotFoundError:
        return {}
    return found


def _found(files: AbstractFileSystem, addresses: list[str]) -> dict[str, dict[str, Any]]:
    """Those of a few files that are there; one request each."""
    found = {}
    for address in addresses:
        with suppress(FileNotFoundError):
            found[address] = files.info(address)
    return found


def _relative(
    files: AbstractFileSystem, root: str, found: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    base = len(files._strip_protocol(root).rstrip("/")) + 1
    return {address[base:]: info for address, info in found.items()}


def _stamp(info: dict[str, Any]) -> str:
    """What changes when a file does: its digest or version where there is one, else size and time."""
    version = info.get("ETag") or info.get("etag")
    return str(version or (info["size"], str(info.get("mtime") or info.get("created"))))


@contextmanager
def explained(place: str, done: str) -> Iterator[None]:
    """Turn what the file systems of fsspec raise into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except ImportError as exc:
        raise StorageError(
            f"{place}: the file system for {place.partition('://')[0]}:// is not installed ({exc})",
            "for s3:// install the extra: pip install -c constraints.txt 'tuneproof[s3]'",
        ) from exc
    except Exception as exc:  # each file system raises errors of its own
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise storage_error(exc, cache_dir()) from exc
        reason = str(exc).partition("\n")[0] or type(exc).__name__
        raise StorageError(
            f"{place} cannot be {done}: {reason}",
            "check the address and the credentials in the environment; nothing that was finished is lost",
        ) from exc
