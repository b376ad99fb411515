"""Small files at a URL that several machines change: a change is made only to the version that was read.

S3 and what speaks its language refuse a write whose condition does not hold (`If-Match`, `If-None-Match`). Whether a
store does is tried before it is relied on, since some take any write in silence. Elsewhere the content is compared
just before the write, which a lease (`lease.py`) must keep to one machine at a time.
"""

from __future__ import annotations

import posixpath
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.core.storage.store import Store, explained, open_place, speaks_s3, write_whole

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PROBE_NAME = ".conditional-writes"
_NO_SUCH_TAG = '"00000000000000000000000000000000"'
# Another write came first (412), one is going on (409), or the file is gone (404).
_REFUSED_STATUS = (404, 409, 412)
_NOT_KNOWN_STATUS = 501

_tried: dict[str, bool] = {}
_trying = threading.Lock()


@dataclass(frozen=True, slots=True)
class Version:
    """A file as it was read: its content (None: there was none), and what the store calls this version."""

    content: bytes | None = None
    tag: str | None = None


class _NotKnownError(Exception):
    """The store does not know the condition of a write."""


def read_version(store: Store, name: str) -> Version:
    """Read a small file at a URL as it is there now. Raises StorageError."""
    with explained(store.place, "read"):
        files, root = open_place(store.place)
        address = posixpath.join(root, name)
        try:
            if speaks_s3(files):
                return _get_s3(files, address)
            return Version(files.cat_file(address))
        except FileNotFoundError:
            return Version()


def replace_version(store: Store, name: str, content: bytes, before: Version) -> bool:
    """Write a small file at a URL if it still is the version `before`; return whether it was written.

    `content` must differ from everything that was there before. A write whose answer was lost is looked up. Raises
    StorageError, after which it may have been written.
    """
    with explained(store.place, "written"):
        files, root = open_place(store.place)
        address = posixpath.join(root, name)
        if _has_conditions(files, root):
            written = _put_s3(files, address, content, before.tag)
        else:
            written = _put_compared(files, address, content, before)
    return written or read_version(store, name).content == content


def has_conditional_writes(store: Store) -> bool:
    """Whether the store at a URL writes a file only where a condition holds. Raises StorageError."""
    with explained(store.place, "written"):
        return _has_conditions(*open_place(store.place))


def _has_conditions(files: AbstractFileSystem, root: str) -> bool:
    """Try it once for each place: a file that is there, and conditions that do not hold."""
    if not speaks_s3(files):
        return False
    address = posixpath.join(root, _PROBE_NAME)
    key = f"{getattr(files, '_endpoint', None) or files.client_kwargs} {address}"
    with _trying:
        if key not in _tried:
            try:
                _put_s3(files, address, b"", None)
                taken = _put_s3(files, address, b"", None) or _put_s3(files, address, b"", _NO_SUCH_TAG)
                _tried[key] = not taken
            except _NotKnownError:
                _tried[key] = False
        return _tried[key]


def _get_s3(files: Any, address: str) -> Version:
    from fsspec.asyn import sync

    bucket, key, _ = files.split_path(address)

    async def get() -> Version:
        found = await files._call_s3("get_object", Bucket=bucket, Key=key)
        async with found["Body"] as body:
            return Version(await body.read(), found["ETag"])

    return sync(files.loop, get)  # type: ignore[no-any-return]


def _put_s3(files: Any, address: str, content: bytes, tag: str | None) -> bool:
    """Write if the file's version is `tag` (None: if there is none); return whether it was written."""
    bucket, key, _ = files.split_path(address)
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    try:
        files.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    except Exception as error:
        code, status = _answer_of(error)
        if code == "NoSuchBucket":
            raise
        if status in _REFUSED_STATUS:
            return False
        if status == _NOT_KNOWN_STATUS:
            raise _NotKnownError from error
        raise
    files.invalidate_cache(address)
    return True


def _answer_of(error: BaseException) -> tuple[str | None, int | None]:
    """Code and status of the answer behind an exception of s3fs."""
    answer = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return answer.get("Error", {}).get("Code"), answer.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _put_compared(files: AbstractFileSystem, address: str, content: bytes, before: Version) -> bool:
    try:
        present = files.cat_file(address)
    except FileNotFoundError:
        present = None
    if present != before.content:
        return False
    write_whole(files, address, content)
    return True
