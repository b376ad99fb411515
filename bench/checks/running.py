"""Runs the checks of a part in processes of their own, whatever becomes of these.

A worker appends what it does to a journal as it goes. When it dies, hangs or fails, its check becomes a failed row
and a fresh process goes on with the next: a GPU context that an error has broken is of no more use.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.checks.rows import Check, Row

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1
# From starting a worker to its first check; checks import their libraries themselves.
START_SECONDS = 60.0
LOG_LINES = 15
# Limits are those of a card; a rehearsal may share few cores with much else.
REHEARSAL_PATIENCE = 6.0
CLEAR_FAILURE = 3
"""Exit code of a worker that ended after a failed row, so that the next check gets a fresh process."""


@dataclass(frozen=True)
class Task:
    """What a worker is started with."""

    part: str
    device: str
    tiny: bool
    folder: Path
    package: str = "bench.gpu_parts"
    seed: int = 0
    seconds: float = 0.0
    patience: float = 1.0
    """Limits are multiplied by it."""


class Journal:
    """What one worker has written: begun checks, rows, ended checks."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.begun: str | None = None
        self.begun_at = time.monotonic()
        self.ended: set[str] = set()

    def news(self) -> list[Row]:
        """Read whole new lines; returns the rows among them."""
        rows: list[Row] = []
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                entry = json.loads(line)
                if "begin" in entry:
                    self.begun, self.begun_at = entry["begin"], time.monotonic()
                elif "end" in entry:
                    self.begun = None
                    self.ended.add(entry["end"])
                else:
                    rows.append(Row(**entry["row"]))
        return rows


def run_checks(
    task: Task, checks: Sequence[Check], end_at: float, on_rows: Callable[[Sequence[Row]], None]
) -> None:
    """Run `checks` until `end_at` (of time.monotonic); every one of them gives at least one row to `on_rows`."""
    waiting = list(checks)
    attempt = 0
    while waiting:
        left = end_at - time.monotonic()
        fitting = [check for check in waiting if check.about_seconds <= left]
        if not fitting or fitting[0] is not waiting[0]:
            check = waiting.pop(0)
            seen = f"time: it takes about {check.about_seconds:.0f} s, {max(0.0, left):.0f} s were left"
            on_rows([Row(check.name, "not run", seen, part=task.part)])
            continue
        attempt += 1
        done = _one_process(task, waiting, end_at, attempt, on_rows)
        waiting = [check for check in waiting if check.name not in done]


def _one_process(
    task: Task,
    checks: Sequence[Check],
    end_at: float,
    attempt: int,
    on_rows: Callable[[Sequence[Row]], None],
) -> set[str]:
    """Run as many of `checks` as one process does; returns the names of those that are over."""
    stem = task.folder / f"{task.part}-{attempt}"
    journal, log_path = Journal(stem.with_suffix(".jsonl")), stem.with_suffix(".log")
    limits = {check.name: task.patience * check.limit_seconds for check in checks}

    def hand_on() -> None:
        rows = [replace(row, part=row.part or task.part) for row in journal.news()]
        if rows:
            on_rows(rows)

    with log_path.open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "bench.checks.worker", f"{task.package}.{task.part}",
             *(check.name for check in checks),
             "--device", task.device, "--folder", str(task.folder), "--journal", str(stem.with_suffix(".jsonl")),
             "--seed", str(task.seed), "--seconds", str(task.seconds), *(["--tiny"] if task.tiny else [])],
            cwd=ROOT, env=_environment(task), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        stopped: Row | None = None
        try:
            while worker.poll() is None and stopped is None:
                time.sleep(POLL_SECONDS)
                hand_on()
                limit = task.patience * START_SECONDS if journal.begun is None else limits[journal.begun]
                stopped = _overdue(journal, limit, end_at)
        finally:
            _kill_all(worker)
    hand_on()
    began = journal.begun
    if stopped is None and (worker.returncode != 0 or began is not None):
        stopped = _death(worker.returncode, began)
    if stopped is not None and (began is not None or not journal.ended):
        name = began or checks[0].name  # one that cannot even start must not be tried forever
        on_rows([replace(stopped, check=name, part=task.part, log=_tail(log_path))])
        return {*journal.ended, name}
    return journal.ended


def _environment(task: Task) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    cache = {"TUNEPROOF_CACHE": os.environ.get("TUNEPROOF_CACHE", str(task.folder / "cache"))}
    places = [str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Only for the part that proves equality: the others run as a user's work does.
    exact = {"NVIDIA_TF32_OVERRIDE": "0"} if task.part == "equality" else {}
    cores = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))}
    return {
        **os.environ, **offline, **cache, **exact, **cores, "PYTHONPATH": os.pathsep.join(places),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def _overdue(journal: Journal, limit_seconds: float, end_at: float) -> Row | None:
    seconds = time.monotonic() - journal.begun_at
    if time.monotonic() > end_at:
        return Row("", "not run", f"time: stopped after {seconds:.0f} s", seconds=seconds)
    if seconds > limit_seconds:
        return Row("", "failed", f"no end within {limit_seconds:.0f} s, killed", seconds=seconds)
    return None


def _death(code: int, began: str | None) -> Row | None:
    if code == CLEAR_FAILURE and began is None:
        return None
    if code < 0:
        cause = f"the process was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += " (the kernel's out-of-memory killer, perhaps)"
    else:
        cause = f"the process ended with exit code {code}"
    return Row("", "failed", cause)


def _kill_all(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and what it has started; all are of its session's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _tail(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
