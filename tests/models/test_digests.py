"""Digests: equal for equal answers, different otherwise, each large file read once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.core.files import write_atomically
from tasks.core.models import digests
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.making.model_files import edit_json

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_REMEMBERED_BYTES", 1)


def test_equal_weights_in_two_directories_have_one_digest(tiny_model_dir: Path, model_copy: Path) -> None:
    edit_json(
        model_copy / "config.json", _name_or_path="elsewhere", transformers_version="4.0", use_cache=False
    )
    assert digests.weights_sha256(model_copy) == digests.weights_sha256(tiny_model_dir)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: build_tiny_model(build_tiny_tokenizer(), seed=9).save_pretrained(d),
        lambda d: edit_json(
            d / "config.json", rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}
        ),
        lambda d: edit_json(d / "generation_config.json", eos_token_id=[2, 3]),
        lambda d: edit_json(d / "tokenizer.json", version="1.1"),
        lambda d: (d / "modeling_own.py").write_text("code"),
    ],
    ids=["weights", "rope", "end tokens", "tokenizer", "code"],
)
def test_what_changes_answers_changes_the_digest(model_copy: Path, change: Any) -> None:
    before = digests.weights_sha256(model_copy)
    change(model_copy)
    assert digests.weights_sha256(model_copy) != before


@pytest.mark.usefixtures("all_are_large")
def test_a_file_is_read_once_until_it_changes(model_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_copy / "model.safetensors"
    first = digests.file_sha256(path)
    read: list[Path] = []
    real_open = Path.open

    def noting(self: Path, *args: Any, **options: Any) -> Any:
        read.append(self)
        return real_open(self, *args, **options)

    monkeypatch.setattr(Path, "open", noting)
    assert digests.file_sha256(path) == first
    assert path not in read
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    status = path.stat()
    path.write_bytes(bytes(content))

    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size and time, as rsync can leave it
    assert digests.file_sha256(path) != first


def test_a_small_file_is_read_each_time_and_a_large_one_is_remembered(tmp_path: Path) -> None:
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    small.write_bytes(bytes((1 << 20) - 1))
    large.write_bytes(bytes(1 << 20))
    for path in (small, large):
        assert digests.file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(json.loads((tmp_path / "cache" / "digests.json").read_text())) == [str(large)]
    assert digests.unread_bytes(small) == (1 << 20) - 1
    assert digests.unread_bytes(large) == 0


@pytest.mark.usefixtures("all_are_large")
def test_a_damaged_digest_cache_is_made_anew(model_copy: Path, tmp_path: Path) -> None:
    path = model_copy / "model.safetensors"
    first = digests.file_sha256(path)
    memory_path = tmp_path / "cache" / "digests.json"
    memory_path.write_text("{broken")
    assert digests.file_sha256(path) == first
    assert json.loads(memory_path.read_text())[str(path)]["sha256"] == first


@pytest.mark.usefixtures("all_are_large")
def test_a_model_is_remembered_at_once_and_what_others_have_remembered_meanwhile_is_seen(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = write_atomically

    def noting(path: Path, content: str) -> None:
        written.append(path)
        write(path, content)

    monkeypatch.setattr(digests, "write_atomically", noting)
    first = digests.weights_sha256(model_copy)
    memory_path = tmp_path / "cache" / "digests.json"
    known = json.loads(memory_path.read_text())
    assert written == [memory_path] and len(known) >= 2  # weights and tokenizer
    assert digests.unread_bytes(model_copy) == 0
    told = {name: {**entry, "sha256": "f" * 64} for name, entry in known.items()}
    write(memory_path, json.dumps(told))  # as another process does
    assert digests.weights_sha256(model_copy) != first
    memory_path.unlink()
    assert digests.unread_bytes(model_copy) > 0
    assert digests.weights_sha256(model_copy) == first


@pytest.mark.usefixtures("all_are_large")
def test_an_interrupt_keeps_the_digests_of_the_files_that_were_read(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, count = hashlib.file_digest, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digests.weights_sha256(model_copy)
    assert len(json.loads((tmp_path / "cache" / "digests.json").read_text())) == 1


@pytest.mark.usefixtures("all_are_large")
def test_digests_work_where_nothing_can_be_remembered(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "file" / "cache"))
    assert len(digests.weights_sha256(model_copy)) == 64
