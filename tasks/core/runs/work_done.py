"""What all sessions of a run did together: time, rows, shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.records import ShardSummary
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import Session, settled_sessions

UNSPLIT = "run"
"""Stands in a summary of shards for the rows that were answered while the run was not split."""


@dataclass(frozen=True, slots=True)
class PartWork:
    """The sessions of one part of a run, `shard` None for the part that is not split, and the rows it gave."""

    shard: str | None
    sessions: tuple[Session, ...]
    rows: int

    @property
    def seconds(self) -> float:
        """Time of its sessions that answered something; a part has one session at a time."""
        return sum(session.seconds for session in self.sessions if session.rows)

    @property
    def untimed_rows(self) -> int:
        """Rows of which no session tells, so that their time is not known."""
        return max(0, self.rows - sum(session.rows for session in self.sessions))


@dataclass(frozen=True, slots=True)
class WorkDone:
    """All parts of a run."""

    parts: tuple[PartWork, ...]

    @classmethod
    def of(cls, run: RunDir, rows_by_ledger: Mapping[Path, int]) -> WorkDone:
        """Read the sessions of all parts; `rows_by_ledger` are the published rows, by the ledger that has them."""
        return cls(
            tuple(
                PartWork(
                    run.shard_name_of(part),
                    tuple(settled_sessions(part)),
                    rows_by_ledger.get(part.ledger_path, 0),
                )
                for part in run.parts()
            )
        )

    @property
    def sessions(self) -> list[Session]:
        """All sessions in the order in which they began."""
        sessions = (session for part in self.parts for session in part.sessions)
        return sorted(sessions, key=lambda session: session.started)

    @property
    def seconds(self) -> float:
        """Time during which rows were generated: parts that work side by side count once.

        By the clock of each machine, but never less than one part alone took: clocks are set back.
        """
        answering = [session for session in self.sessions if session.rows]
        longest = max((part.seconds for part in self.parts), default=0.0)
        together = sum(part.seconds for part in self.parts)
        return min(together, max(longest, seconds_covered(answering)))

    @property
    def untimed_rows(self) -> int:
        """Rows whose time is not known."""
        return sum(part.untimed_rows for part in self.parts)

    def shards(self) -> tuple[ShardSummary, ...]:
        """Sum up what each shard did, of whatever count; all rows together are those of the run."""
        names = sorted({part.shard for part in self.parts if part.shard is not None}, key=_shard_order)
        parts = {name: [part for part in self.parts if part.shard == name] for name in names}
        if names:
            parts[UNSPLIT] = [part for part in self.parts if part.shard is None]
        summaries = (_summary(name, own) for name, own in parts.items())
        return tuple(summary for summary in summaries if summary.rows or summary.seconds)


def _summary(name: str, parts: Sequence[PartWork]) -> ShardSummary:
    sessions = [session for part in parts for session in part.sessions]
    return ShardSummary(
        shard=name,
        rows=sum(part.rows for part in parts),
        seconds=round(sum(part.seconds for part in parts), 3),
        hosts=tuple(sorted({session.host for session in sessions if session.host is not None})),
        devices=tuple(sorted({session.device for session in sessions})),
    )


def seconds_covered(sessions: Sequence[Session]) -> float:
    """Return the time during which at least one session ran, by their clocks."""
    covered, end = 0.0, -math.inf
    for session in sorted(sessions, key=lambda session: session.started):
        start = session.started.timestamp()
        stop = start + session.seconds
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _shard_order(name: str) -> tuple[int, int]:
    index, _, count = name.partition("-of-")
    return int(count), int(index)
