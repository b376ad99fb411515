"""A disk that is full when the answers are published: a clear error, nothing lost, and the same command ends it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.core.config import Config, load_config
from tasks.core.errors import StorageError
from tasks.core.runs.run_dir import RunDir
from tasks.inferencer import Inferencer

ROWS = 24
PAGE_BYTES = 4096


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, own_cache: Path) -> Config:
    rows = [{"question": f"How many legs has dog {number}?", "answer": "4"} for number in range(ROWS)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inferencer = {
        "model": str(tiny_model_dir), "testing_data_id": str(tmp_path / "questions.jsonl"), "max_new_tokens": 4,
        "temperature": 0, "device": "cpu", "run_name": "run", "score_references": False,
    }  # fmt: skip
    overrides = {f"inferencer.{key}": value for key, value in inferencer.items()}
    places = {f"pipeline.{kind}_dir": str(tmp_path / kind) for kind in ("runs", "models")}
    return load_config(None, {**overrides, **places})


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """Leave two pages of the file system; what took the rest is removed at the end."""
    filler_path = directory / "filler"
    with filler_path.open("wb", buffering=0) as filler:
        try:
            while filler.write(b"\0" * PAGE_BYTES):
                pass
        except OSError:
            filler.truncate(filler.tell() - 2 * PAGE_BYTES)
    yield
    filler_path.unlink()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes into a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unpublished(run: RunDir) -> bool:
    return not [
        path.name for path in run.path.iterdir() if path.name.startswith(("inferencer_output", "man"))
    ]


def test_publishing_beyond_a_file_size_limit_is_a_clear_error_and_works_afterwards(settings: Config) -> None:
    inferencer = Inferencer(settings)
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    index = inferencer.generate_responses(prepared)
    ledger = prepared.run.ledger_path.read_bytes()
    with largest_file(PAGE_BYTES), pytest.raises(StorageError) as caught:
        inferencer.publish(prepared, index)
    assert "inferencer_output.jsonl cannot be written" in caught.value.what
    assert "rows finished so far are kept" in str(caught.value.next_step)
    assert unpublished(prepared.run)
    assert Inferencer(settings).infer().row_count == ROWS
    assert prepared.run.ledger_path.read_bytes() == ledger


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_publishing_on_a_full_disk_is_a_clear_error_and_works_when_there_is_space(
    settings: Config, tmp_path: Path
) -> None:
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(runs_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        inferencer = Inferencer(settings)
        prepared = inferencer.process_dataset(inferencer.load_dataset())
        index = inferencer.generate_responses(prepared)
        ledger = prepared.run.ledger_path.read_bytes()
        with full_disk(runs_dir):
            with pytest.raises(StorageError) as caught:
                inferencer.publish(prepared, index)
            assert "no space left while writing" in caught.value.what
            assert caught.value.what.endswith("inferencer_output.jsonl")
            assert "run the same command again" in str(caught.value.next_step)
            assert unpublished(prepared.run)
            assert prepared.run.ledger_path.read_bytes() == ledger
        assert Inferencer(settings).infer().row_count == ROWS
        assert prepared.run.ledger_path.read_bytes() == ledger
    finally:
        subprocess.run(["umount", str(runs_dir)], check=True)
