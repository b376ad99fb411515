"""The examples of a run, kept after they were read once: in memory, or where they are too many in a scratch file."""

from __future__ import annotations

import pickle
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

from tasks.core.errors import StorageError
from tasks.core.files import cache_dir
from tasks.core.records import Example

MOST_BYTES_KEPT = 128 << 20
"""Examples that take more memory than this, by estimate, go to the scratch file."""
_BYTES_OF_A_ROW = 400  # an example and its strings, without their characters
_ROWS_OF_A_BLOCK = 1000


class KeptExamples:
    """Gives what was added, in order, as often as it is called.

    What is in memory can be pickled and travels to other processes. The scratch file has no name, so that nothing is
    left of it whatever ends the process; a copy in another process is empty, which `are_here` tells.
    """

    def __init__(self) -> None:
        self.are_here = True
        """Whether the examples can be read in this process."""
        self._rows: list[Example] = []
        self._bytes = 0
        self._scratch: _Scratch | None = None

    def add(self, example: Example) -> None:
        """Keep one more. Raises StorageError when the scratch file cannot be written."""
        self._rows.append(example)
        if self._scratch is not None:
            if len(self._rows) >= _ROWS_OF_A_BLOCK:
                self._empty_into(self._scratch)
            return
        self._bytes += _size(example)
        if self._bytes > MOST_BYTES_KEPT:
            self._scratch = _Scratch()
            self._empty_into(self._scratch)

    def _empty_into(self, scratch: _Scratch) -> None:
        for start in range(0, len(self._rows), _ROWS_OF_A_BLOCK):
            scratch.write(self._rows[start : start + _ROWS_OF_A_BLOCK])
        self._rows.clear()

    def __call__(self) -> Iterator[Example]:
        """Give all of them from the start."""
        if not self.are_here:
            raise ValueError("these examples stayed in the process that read them")
        if self._scratch is not None:
            yield from self._scratch.rows()
        yield from self._rows

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._scratch is not None:
            state.update(are_here=False, _rows=[], _scratch=None)
        return state


class _Scratch:
    """Blocks of examples in a file without a name."""

    def __init__(self) -> None:
        folder = cache_dir() / "rows"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this lives
        except OSError as exc:
            raise _not_written(exc) from exc
        self._blocks: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def write(self, rows: list[Example]) -> None:
        content = pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)
        try:
            with self._lock:
                start = self._file.seek(0, 2)
                self._file.write(content)
                self._file.flush()
        except OSError as exc:
            raise _not_written(exc) from exc
        self._blocks.append((start, len(content)))

    def rows(self) -> Iterator[Example]:
        for start, length in self._blocks:
            with self._lock:
                self._file.seek(start)
                content = self._file.read(length)
            yield from pickle.loads(content)


def _not_written(error: OSError) -> StorageError:
    return StorageError(
        f"the rows, which are too many for memory, cannot be written below {cache_dir()}: {error}",
        "free some disk space, or set TUNEPROOF_CACHE to a folder that can be written",
    )


def _size(example: Example) -> int:
    """About how many bytes an example takes."""
    texts = [
        example.question,
        example.system,
        example.reference,
        example.reference_reasoning,
        example.problem,
    ]
    texts += example.other_references
    for turn in example.messages or ():
        texts += (turn.content, turn.reasoning)
    return _BYTES_OF_A_ROW + sum(sys.getsizeof(text) for text in texts if text)
