"""What is reported: rows, the checks that yield them, and what a check is given."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["passed", "failed", "measured", "skipped", "not run"]
Figures = dict[str, float | int | str]


@dataclass(frozen=True)
class Row:
    """One line of the table. `figures` has units in its names; `seen` is for people."""

    check: str
    outcome: Outcome
    seen: str
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    part: str = ""
    log: str = ""
    """Last lines of a failed process."""

    def as_line(self) -> str:
        """Return the row as JSON on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Row:
        """Read what `as_line` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Bench:
    """What a check is given: the device (cpu, cuda or cuda:N), tiny models or real ones, a folder for files.

    `seed` and `seconds`, of all checks together, are for checks that go on at random until their time is up.
    """

    device: str
    tiny: bool
    folder: Path
    seed: int = 0
    seconds: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether results are those of a GPU; elsewhere the same code is only rehearsed."""
        return self.device != "cpu"

    def judged(self, check: str, ok: bool, seen: str, figures: Figures | None = None) -> Row:
        """Return a row that passed or failed."""
        return Row(check, "passed" if ok else "failed", seen, figures or {})

    def judged_on_gpu(self, check: str, ok: bool, seen: str, figures: Figures | None = None) -> Row:
        """Return a row that only a GPU can pass; a rehearsal that failed has failed."""
        if self.on_gpu or not ok:
            return self.judged(check, ok, seen, figures)
        return Row(check, "skipped", f"needs a GPU; rehearsed: {seen}", figures or {})

    def tried(self, check: str, function: Callable[[], Row]) -> Row:
        """Return the row of `function`, or one that says how it failed, so that what comes after still runs."""
        started = time.perf_counter()
        try:
            row = function()
        except Exception as error:  # whatever a library raises on a card that nobody has tried
            row = Row(check, "failed", f"{type(error).__name__}: {first_line(error)}", log=last_frames(error))
        return Row(**{**asdict(row), "seconds": row.seconds or time.perf_counter() - started})


@dataclass(frozen=True)
class Check:
    """One check of a part: at most `limit_seconds`, usually about `about_seconds` on a card."""

    name: str
    function: Callable[[Bench], Iterator[Row]]
    about_seconds: float
    limit_seconds: float


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def last_frames(error: BaseException, count: int = 5) -> str:
    """Return where in our code an error was raised, the innermost last."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename][-count:]
    return "\n".join(f"{os.path.relpath(frame.filename)}:{frame.lineno} {frame.name}" for frame in own)


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| part | check | outcome | seconds | seen |"
    yield "|---|---|---|---|---|"
    for row in rows:
        seen = row.seen.replace("|", "/").replace("\n", " ")
        yield f"| {row.part} | {row.check} | {row.outcome} | {row.seconds:.1f} | {seen} |"


def counted(rows: list[Row]) -> dict[str, Any]:
    """Count the rows of each outcome."""
    return {kind: sum(row.outcome == kind for row in rows) for kind in Outcome.__args__}  # type: ignore[attr-defined]
