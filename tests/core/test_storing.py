"""Whatever a library raises when the disk takes nothing is one kind of error, with the path and what to do."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tasks.core.errors import StorageError
from tasks.core.files import storing
from tasks.core.leftovers import remove_leftovers

LIMIT_BYTES = 2000


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes into a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_checkpoint(folder: Path, _tokenizer: Any) -> None:
    torch.save({"state": torch.zeros(9000)}, str(folder / "scheduler.pt"))


def save_random_state(folder: Path, _tokenizer: Any) -> None:
    torch.save({"state": list(range(9000))}, folder / "rng_state.pth")


def save_weights(folder: Path, _tokenizer: Any) -> None:
    save_file({"weight": torch.zeros(9000)}, folder / "adapter_model.safetensors")


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(folder))


def save_text(folder: Path, _tokenizer: Any) -> None:
    (folder / "README.md").write_text("x" * 9000)


WRITERS = (save_checkpoint, save_random_state, save_weights, save_tokenizer, save_text)


@pytest.mark.parametrize("write", WRITERS)
def test_a_write_that_a_limit_stops_is_a_storage_error_with_the_path(
    tmp_path: Path, tiny_tokenizer: Any, write: Callable[[Path, Any], None]
) -> None:
    with largest_file(LIMIT_BYTES), pytest.raises(StorageError) as caught, storing(tmp_path, "all is kept"):
        write(tmp_path, tiny_tokenizer)
    assert str(tmp_path) in caught.value.what
    assert "run the same command again" in str(caught.value.next_step) and "kept" in str(
        caught.value.next_step
    )


@pytest.mark.parametrize("write", [save_checkpoint, save_random_state, save_text])
def test_a_full_disk_is_told_as_one(tmp_path: Path, write: Callable[[Path, Any], None]) -> None:
    for name in ("scheduler.pt", "rng_state.pth", "README.md"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"space|written"), storing(tmp_path):
        write(tmp_path, None)


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_is_gone_is_a_storage_error(
    tmp_path: Path, tiny_tokenizer: Any, write: Callable[[Path, Any], None]
) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(StorageError), storing(place / "folder"):
        write(place / "folder", tiny_tokenizer)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no such key"), OSError(12, "Cannot allocate memory")]
)
def test_what_is_no_failed_write_is_raised_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, storing(tmp_path):
        raise error
    assert caught.value is error


def test_folders_that_killed_writers_left_are_removed_too(tmp_path: Path) -> None:
    left, own = tmp_path / ".a.xlsx.4194305-0123abcd.tmp", tmp_path / f".a.xlsx.{os.getpid()}-0123abcd.tmp"
    for folder in (left, own):
        folder.mkdir()
        (folder / "part").write_text("x")
    remove_leftovers(tmp_path)
    assert not left.exists() and own.exists()
