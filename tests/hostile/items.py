"""What an item of the corpus is, and how rows and models are written for one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["answered", "error rows", "refused"]
Overrides = dict[str, Any]
SOUND = {"question": "How many legs has a dog?", "answer": "4"}
MARKER = "code-was-run"
"""A file of this name beside an item says that code of it was run."""


@dataclass(frozen=True)
class Item:
    """Something that a stranger may hand us.

    `make` writes it into a folder, given the sound model, and returns the settings that name it. `outcome` is that of
    `tuneproof infer`: all rows answered; the hostile rows are error rows; or a refusal with one message. `says` is a
    pattern that the message, or each error, must fit. `slow` items take more than some seconds or much memory.
    """

    name: str
    make: Callable[[Path, Path], Overrides]
    outcome: Outcome
    says: str = ""
    slow: bool = False


def line(name: str, content: bytes | str, outcome: Outcome, says: str = "", *, slow: bool = False) -> Item:
    """One hostile line of a JSONL file, after a sound row."""
    raw = content.encode() if isinstance(content, str) else content

    def make(folder: Path, _model_dir: Path) -> Overrides:
        return data(folder / "rows.jsonl", json.dumps(SOUND).encode() + b"\n" + raw + b"\n")

    return Item(name, make, outcome, says, slow)


def file(
    name: str, file_name: str, content: bytes | Callable[[], bytes], outcome: Outcome, says: str = "", *,
    slow: bool = False,
) -> Item:  # fmt: skip
    """One hostile file of data."""

    def make(folder: Path, _model_dir: Path) -> Overrides:
        return data(folder / file_name, content() if callable(content) else content)

    return Item(name, make, outcome, says, slow)


def data(path: Path, content: bytes) -> Overrides:
    """Write a file of data and name it."""
    path.write_bytes(content)
    return {"inferencer.testing_data_id": str(path)}


def changed_model(
    name: str, change: Callable[[Path], object], outcome: Outcome, says: str = "", *, slow: bool = False
) -> Item:
    """A copy of the sound model that `change` spoils."""

    def make(folder: Path, model_dir: Path) -> Overrides:
        own = Path(shutil.copytree(model_dir, folder / "model"))
        change(own)
        return {"inferencer.model": str(own)}

    return Item(name, make, outcome, says, slow)


def changed_json(path: Path, **changes: Any) -> None:
    """Change some fields of a JSON file; None takes one away."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
        if value is None:
            del content[key]
    path.write_text(json.dumps(content))
