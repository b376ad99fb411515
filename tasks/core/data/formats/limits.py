"""Bounds of what is read: how much a packed file may unpack to, how long a line and how wide a table may be.

They lie far above what people train with. A file beyond them was made to fill memory or disk, or is damaged, and is
refused with an error that names the size and the limit.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr

from tasks.core.errors import DataError

LONGEST_LINE_BYTES = 256 << 20
MOST_COLUMNS = 10_000
UNPACKED_TIMES = 200
"""Text of any kind packs to a fiftieth at most; what unpacks to more than this, beyond `UNPACKED_BYTES`, is no text."""
UNPACKED_BYTES = 64 << 20
# A JSON value in memory takes several times its text.
_MEMORY_PER_BYTE = 6


class UnpackedFile(io.RawIOBase):
    """The bytes of a gzip file; DataError as soon as it has unpacked to far more than its own size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed = path.open("rb")
        self._unpacked = gzip.GzipFile(fileobj=self._packed)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: the beginning is unpacked again."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place of the unpacked bytes."""
        return self._unpacked.seek(offset, whence)

    def tell(self) -> int:
        """The place in the unpacked bytes."""
        return self._unpacked.tell()

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer with unpacked bytes; return how many there were."""
        count = self._unpacked.readinto(buffer)
        unpacked, packed = self._unpacked.tell(), self._packed.tell()
        if unpacked > max(UNPACKED_BYTES, UNPACKED_TIMES * packed):
            raise DataError(
                f"{self._path}: its first {size_text(packed)} unpack to more than {size_text(unpacked)}, over "
                f"{UNPACKED_TIMES} times as much: it is damaged, or was made to fill memory.",
                "Check where the file comes from; if it is what you want, unpack it yourself.",
            )
        return count

    def close(self) -> None:
        """Close both files."""
        if not self.closed:
            self._unpacked.close()
            self._packed.close()
        super().close()


def bounded_lines(file: IO[AnyStr], path: Path, lines_before: int = 0) -> Iterator[AnyStr]:
    """The lines of an open file; DataError for one longer than `LONGEST_LINE_BYTES` (of text: in characters)."""
    number = lines_before
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > LONGEST_LINE_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {size_text(LONGEST_LINE_BYTES)}, the limit for one row.",
                "Split the row, or remove it.",
            )
        yield line


def read_whole(file: IO[bytes], path: Path) -> bytes:
    """All bytes of a file that is one JSON value; DataError when the value would not fit into free memory."""
    import psutil

    limit = psutil.virtual_memory().available // _MEMORY_PER_BYTE
    parts, size = [], 0
    while part := file.read(1 << 20):  # asked for more at once, it would set that much aside
        parts.append(part)
        size += len(part)
        if size > limit:
            raise DataError(
                f"{path} is one JSON value of more than {size_text(limit)}, which is read whole and does not fit "
                "into the memory that is free.",
                "Save the rows as JSON Lines (one object a line), which are read one by one.",
            )
    return b"".join(parts)


def check_width(columns: int, where: str | Path) -> None:
    """Raise DataError for a table of more than `MOST_COLUMNS` columns."""
    if columns > MOST_COLUMNS:
        raise DataError(
            f"{where}: more than {MOST_COLUMNS:,} columns ({columns:,}).",
            "Keep the columns that are needed: question, reference, system prompt.",
        )


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def named_paths(paths: Sequence[Path]) -> str:
    """One file, or the folder of several and how many there are."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
