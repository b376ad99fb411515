"""One process of a bench: `python -m bench.checks.worker MODULE CHECK… --journal FILE`; see running.py."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from bench.checks.rows import Bench, Check, Row, first_line, last_frames
from bench.checks.running import CLEAR_FAILURE


def main() -> int:
    """Run the checks that are named; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("checks", nargs="+")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    options = parser.parse_args()
    faulthandler.enable()
    _end_with_parent()
    bench = Bench(options.device, options.tiny, options.folder, options.seed, options.seconds)
    module = importlib.import_module(options.module)
    known = {check.name: check for check in module.CHECKS}
    with options.journal.open("w", encoding="utf-8") as journal:
        for name in options.checks:
            if not _run(bench, known[name], journal):
                return CLEAR_FAILURE
    return 0


def _run(bench: Bench, check: Check, journal: IO[str]) -> bool:
    """Write the check's rows as they come; returns whether this process is fit for the next."""
    _write(journal, begin=check.name)
    fit, started = True, time.perf_counter()

    def put(row: Row) -> None:
        nonlocal started, fit
        now = time.perf_counter()
        _write(journal, row=asdict(replace(row, seconds=round(row.seconds or now - started, 3))))
        started, fit = now, fit and row.outcome != "failed"

    try:
        for row in check.function(bench):
            put(row)
    except Exception as error:  # any failure is a row; see Bench.tried
        seen = f"{type(error).__name__}: {first_line(error)}"
        put(Row(check.name, "failed", seen, log=last_frames(error)))
    _write(journal, end=check.name)
    return fit


def _write(journal: IO[str], **entry: object) -> None:
    journal.write(json.dumps(entry) + "\n")
    journal.flush()


def _end_with_parent() -> None:
    """End when the parent is gone: an orphan would go on to hold the GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
