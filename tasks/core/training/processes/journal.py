"""What became of a group's earlier tries: a file beside the checkpoints, which every process of the next try reads."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.core.files import storing
from tasks.core.records import MemoryEvent, TrainingRestart

_PREFIX = ".group-"


@dataclass(frozen=True, slots=True)
class Journal:
    """Shortages of memory and restarts of one group of processes; the first process or its parent writes."""

    path: Path

    @classmethod
    def of(cls, checkpoints_dir: Path, group_id: str, *, tidies: bool) -> Journal:
        """The journal of a group. Who `tidies` removes those of groups before it, which ended in the middle."""
        mine = checkpoints_dir / f"{_PREFIX}{group_id}.jsonl"
        for other in checkpoints_dir.glob(f"{_PREFIX}*.jsonl") if tidies else ():
            if other != mine:
                other.unlink(missing_ok=True)
        return cls(mine)

    def note(self, event: MemoryEvent | TrainingRestart) -> None:
        """Add an event. Raises StorageError."""
        line = {type(event).__name__: event.model_dump()}
        with storing(self.path, "what it told of is in the log"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def memory_events(self) -> tuple[MemoryEvent, ...]:
        """Each time memory ran out, in order."""
        return tuple(MemoryEvent(**line["MemoryEvent"]) for line in self._lines() if "MemoryEvent" in line)

    @property
    def restarts(self) -> tuple[TrainingRestart, ...]:
        """Each time the group was begun again, in order."""
        found = (line["TrainingRestart"] for line in self._lines() if "TrainingRestart" in line)
        return tuple(TrainingRestart(**restart) for restart in found)

    def forget(self) -> None:
        """Remove the file: it stands in the manifest now."""
        self.path.unlink(missing_ok=True)

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        with suppress(OSError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, ValidationError):  # cut off by the death that it tells of
                    lines.append(json.loads(line))
        return lines
