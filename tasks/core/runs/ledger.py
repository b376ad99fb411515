"""The ledger: one line per finished row, appended and durable, so that nothing that was answered is ever lost."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

import numpy as np

from tasks.core.errors import LedgerCorruptError
from tasks.core.files import flush_to_disk, storage_error
from tasks.core.records import Completion
from tasks.core.runs import ledger_lines
from tasks.core.runs.ledger_lines import DamagedLineError, completion_in, without_checksum
from tasks.core.runs.periodic_sync import PeriodicSync

logger = logging.getLogger(__name__)

Ids = np.ndarray[tuple[int], np.dtype[np.bytes_]]
Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]
Sources = np.ndarray[tuple[int], np.dtype[np.int32]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
ABSENT = -1
"""Offset of a row that the ledger does not have."""
ROWS_KEPT = "all rows finished so far are kept"


_FIELDS = tuple(field.name for field in fields(Completion))
# Ledgers held open at once while rows are read from many of them.
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class LedgerIndex:
    """Where each row's line is, by dataset position: in which of the ledgers, and its byte offset there.

    `offsets` is `ABSENT` for a row that none of them has; `sources` counts in `paths`; `failed` marks error rows.
    """

    offsets: Offsets
    sources: Sources
    failed: Mask
    paths: tuple[Path, ...]
    run_key: str

    @property
    def finished(self) -> int:
        """Rows the ledger has."""
        return int(np.count_nonzero(self.offsets != ABSENT))

    def only(self, wanted: Mask) -> LedgerIndex:
        """Return the index of some of the rows."""
        return replace(
            self, offsets=self.offsets[wanted], sources=self.sources[wanted], failed=self.failed[wanted]
        )

    def rows_by_ledger(self) -> dict[Path, int]:
        """How many rows each ledger gives."""
        counts = np.bincount(self.sources[self.offsets != ABSENT], minlength=len(self.paths))
        return {path: int(count) for path, count in zip(self.paths, counts, strict=True)}


class Ledger:
    """Append-only JSONL file of completions.

    A line is handed to the operating system when its row finishes, so the death of the process loses nothing;
    a thread forces it to the disk at most `sync_seconds` later, whether or not further rows finish, so a power
    failure loses at most that much work. Each line carries a checksum, by which damage is found later. A torn last
    line (the machine died while writing it) is cut off on opening. Use as a context manager.
    """

    def __init__(self, path: Path, run_key: str, *, sync_seconds: float = 1.0) -> None:
        self.path = path
        self._run_key = run_key
        self._sync_seconds = sync_seconds
        self._descriptor = -1
        self._size = 0
        self._sync = PeriodicSync(-1, sync_seconds)

    def __enter__(self) -> Ledger:
        """Open for appending; raises StorageError when the file cannot be opened or repaired."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            self._descriptor = os.open(self.path, flags, 0o644)
            self._size = _cut_torn_line(self._descriptor, self.path)
        except OSError as exc:
            raise storage_error(exc, self.path, ROWS_KEPT) from exc
        if self._size == 0:  # maybe new, and a file without a directory entry is lost too
            flush_to_disk(self.path.parent)
        self._sync = PeriodicSync(self._descriptor, self._sync_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Force everything to the disk and close. Raises StorageError when that fails and nothing else did."""
        try:
            try:
                self._sync.close()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1
        except OSError as failure:
            error = storage_error(failure, self.path, ROWS_KEPT)
            if exc is None:
                raise error from failure
            logger.warning("%s", error.what)

    def append(self, completion: Completion) -> int:
        """Write one row's line and return its byte offset; see `append_line`."""
        return self.append_line(_as_written(completion))

    def append_line(self, record: dict[str, Any]) -> int:
        """Write one row's line, of which `id` and `error` (none or null: it is well) are read again by an index.

        Raises StorageError when it cannot be written whole, or an earlier one not be forced to the disk; what
        was written before stays intact.
        """
        line = ledger_lines.written(record, self._run_key)
        offset = self._size
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as exc:
            self._undo(offset)
            raise storage_error(exc, self.path, ROWS_KEPT) from exc
        self._size += len(line)
        try:
            self._sync.written()
        except OSError as exc:
            raise storage_error(exc, self.path, ROWS_KEPT) from exc
        return offset

    def sync(self) -> None:
        """Force what was written to the disk."""
        try:
            self._sync.force()
        except OSError as exc:
            raise storage_error(exc, self.path, ROWS_KEPT) from exc

    def _undo(self, offset: int) -> None:
        try:
            os.ftruncate(self._descriptor, offset)
        except OSError:
            logger.warning("%s: the half-written last line stays; it is dropped on the next start", self.path)


def _as_written(completion: Completion) -> dict[str, Any]:
    """What a line holds; the fields of thoughts only where there are some."""
    record = {name: getattr(completion, name) for name in _FIELDS}
    for name in ("reasoning", "reasoning_tokens", "is_cut_in_thoughts"):
        if not record[name]:
            del record[name]
    return record


def index_ledgers(
    paths: Sequence[Path],
    ids: Ids,
    run_key: str,
    check: Callable[[bytes], tuple[str, bool]] = ledger_lines.completion_head,
) -> LedgerIndex:
    """Read several ledgers of one run once, with memory for ids and offsets only.

    Of lines with the same id the first in the first ledger counts. Lines that are damaged, of another run, of no row of
    this one, or that repeat a row of the same ledger never count; a warning names them, and the row of a damaged
    one is missing. `check` gives a line's id and whether it is an error row, or raises DamagedLineError.
    """
    offsets = np.full(len(ids), ABSENT, dtype=np.int64)
    sources = np.zeros(len(ids), dtype=np.int32)
    failed = np.zeros(len(ids), dtype=np.bool_)
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    for source, path in enumerate(paths):
        unused = _Unused(path)
        for number, offset, line in _lines(path, run_key):
            try:
                row_id, error = check(without_checksum(line, run_key))
            except DamagedLineError as exc:
                unused.damaged(number, line, str(exc))
                continue
            encoded = row_id.encode()
            place = int(np.searchsorted(sorted_ids, encoded))
            if place >= len(sorted_ids) or sorted_ids[place] != encoded:
                unused.strange(number, line)
                continue
            position = int(order[place])
            if offsets[position] == ABSENT:
                offsets[position], sources[position], failed[position] = offset, source, error
            elif sources[position] == source:
                unused.repeated(number, line)
        unused.tell()
    return LedgerIndex(offsets, sources, failed, tuple(paths), run_key)


class _Unused:
    """The lines of one ledger that do not count; each is told of once in a process."""

    _told: ClassVar[set[tuple[Path, int, int]]] = set()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._strange: list[int] = []
        self._repeated: list[int] = []

    def damaged(self, number: int, line: bytes, reason: str) -> None:
        if self._is_new(number, line):
            told = "%s: line %d is damaged (%s); it does not count, and its row is asked again if no other line has it"
            logger.warning(told, self._path, number, reason)

    def strange(self, number: int, line: bytes) -> None:
        if self._is_new(number, line):
            self._strange.append(number)

    def repeated(self, number: int, line: bytes) -> None:
        if self._is_new(number, line):
            self._repeated.append(number)

    def tell(self) -> None:
        if self._strange:
            told = "%s: %s of no row of this run: left out"
            logger.warning(told, self._path, _named(self._strange, "is", "are"))
        if self._repeated:
            told = "%s: %s a row that an earlier line has: the earlier one counts"
            logger.warning(told, self._path, _named(self._repeated, "repeats", "repeat"))

    def _is_new(self, number: int, line: bytes) -> bool:
        key = self._path, number, zlib.crc32(line)
        is_new = key not in self._told
        self._told.add(key)
        return is_new


def _named(numbers: Sequence[int], one: str, several: str) -> str:
    """Give `line 7 is`, or `lines 7, 8, 9, 12, 15 and 3 more are`."""
    first, more = ", ".join(map(str, numbers[:5])), len(numbers) - 5
    rest = f" and {more} more" if more > 0 else ""
    return f"line {first} {one}" if len(numbers) == 1 else f"lines {first}{rest} {several}"


def read_lines(index: LedgerIndex) -> Iterator[bytes]:
    """Yield the line of each row in dataset order, from whichever ledger has it, with constant memory.

    Lines are as they were given to be written, without checksum. Every row must be there.
    Raises LedgerCorruptError for a line that was damaged since the index was made.
    """
    files: dict[int, BinaryIO] = {}
    try:
        for source, offset in zip(index.sources, index.offsets, strict=True):
            file = files.get(int(source))
            if file is None:
                if len(files) == _OPEN_FILES:
                    files.pop(next(iter(files))).close()
                file = files[int(source)] = index.paths[int(source)].open("rb")
            file.seek(int(offset))
            try:
                yield without_checksum(file.readline(), index.run_key)
            except DamagedLineError as exc:
                raise _changed(index.paths[int(source)], int(offset), exc) from exc
    finally:
        for file in files.values():
            file.close()


def read_completions(index: LedgerIndex) -> Iterator[Completion]:
    """Yield the completion of each row in dataset order; see `read_lines`."""
    for line, source, offset in zip(read_lines(index), index.sources, index.offsets, strict=True):
        try:
            yield completion_in(line)
        except DamagedLineError as exc:
            raise _changed(index.paths[int(source)], int(offset), exc) from exc


def _changed(path: Path, offset: int, exc: DamagedLineError) -> LedgerCorruptError:
    return LedgerCorruptError(
        f"{path}: the line at byte {offset} was damaged just now ({exc})",
        "run the same command again: its row is asked again, all others are kept",
    )


def _lines(path: Path, run_key: str) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and content of each whole line; nothing where there is no file.

    Where damage has eaten the end of a line, the next one is found behind it all the same.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if (behind := ledger_lines.whole_line_behind(line, run_key)) is None:
                yield number, offset, line
            else:
                yield number, offset, line[:behind]
                yield number, offset + behind, line[behind:]
            offset += len(line)


def count_lines(path: Path) -> int:
    """Lines of a file, a torn last one left out; 0 where there is no file."""
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    except FileNotFoundError:
        return 0


def _cut_torn_line(descriptor: int, path: Path) -> int:
    """Cut what follows the last newline; return the size that remains."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        block = os.pread(descriptor, end - start, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        logger.warning("%s: the last line was torn (%d bytes); its row is generated again", path, size - end)
        os.ftruncate(descriptor, end)
    return end
