"""The rows of a bench as they come, and the JSON file that always has all of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.checks.rows import Row, counted


class Results:
    """All rows so far, and the JSON file that has them."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._about = path, about
        self.rows: list[Row] = []
        self.finished = False

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows, print them, write the file."""
        for row in rows:
            self.rows.append(row)
            print(f"{row.part}: {row.check}: {row.outcome}: {row.seen}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write the file whole: beside, then renamed, so that a kill leaves the last whole one."""
        content = {
            **self._about, "finished": self.finished, "counts": counted(self.rows),
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
