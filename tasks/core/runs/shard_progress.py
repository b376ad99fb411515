"""How far all shards together are, read from their ledgers as they grow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.ledger_lines import DamagedLineError, completion_in, without_checksum
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import count_out_of_memory, read_sessions

logger = logging.getLogger(__name__)


class LedgerWatch:
    """Counts what is appended to the ledgers of a run after it was made."""

    def __init__(self, run: RunDir, index: LedgerIndex) -> None:
        self._run = run
        self._total, self._done = len(index.offsets), index.finished
        self._run_key = run.run_key
        self._read_bytes: dict[Path, int] = {path: path.stat().st_size for path in run.ledger_paths()}
        self._rows = self._tokens = self._batch_size = 0
        self._errors = int(index.failed.sum())
        self._started = time.monotonic()

    def look(self) -> GenerationProgress:
        """Read what is new and return where the run is; rates are since the watch began."""
        for path in self._run.ledger_paths():
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):  # being written
                        break
                    self._read_bytes[path] = self._read_bytes.get(path, 0) + len(line)
                    self._count(line)
        seconds = max(1e-6, time.monotonic() - self._started)
        rate = self._rows / seconds
        done = min(self._total, self._done + self._rows)
        parts = self._run.parts()
        sessions = [session for part in parts for session in read_sessions(part)]
        return GenerationProgress(
            rows_done=done,
            rows_total=self._total,
            error_rows=self._errors,
            rows_per_second=rate,
            tokens_per_second=self._tokens / seconds,
            eta_seconds=(self._total - done) / rate if rate else None,
            limit_tokens=sessions[-1].limit_tokens if sessions else 0,
            batch_size=self._batch_size,
            out_of_memory_count=count_out_of_memory(parts),
        )

    def _count(self, line: bytes) -> None:
        try:
            row = completion_in(without_checksum(line, self._run_key))
        except DamagedLineError:  # told of where the ledger is read for good
            return
        self._rows += 1
        self._tokens += row.completion_tokens
        self._errors += row.error is not None
        self._batch_size = row.batch_size


@contextmanager
def watched(
    run: RunDir,
    index: LedgerIndex,
    report: Callable[[GenerationProgress], None] | None,
    *,
    interval_seconds: float = 1.0,
) -> Iterator[None]:
    """Report the progress of all shards while the block runs, and once at its end."""
    if report is None:
        yield
        return
    watch, over = LedgerWatch(run, index), threading.Event()

    def tell() -> None:
        try:
            report(watch.look())
        except Exception as exc:  # what shows progress must never end the work
            logger.debug("progress could not be shown: %s", exc)

    def repeat() -> None:
        while not over.wait(interval_seconds):
            tell()

    # In a copy of the context, so that what shows progress finds its run.
    thread = threading.Thread(target=copy_context().run, args=(repeat,), name="shard-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        tell()
