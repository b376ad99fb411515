"""The ledger loses nothing and repairs itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.errors import LedgerCorruptError, StorageError
from tasks.core.records import Completion
from tasks.core.runs.ledger import ABSENT, Ledger, LedgerIndex, index_ledgers, read_completions


def answer(row_id: str, text: str = "an answer") -> Completion:
    return Completion(row_id, text, "stop", 3, 2, 0.5, 4)


def ids(*names: str) -> np.ndarray:
    return np.array([name.encode() for name in names], dtype="S28")


KEY = "0" * 64


def missing(index: LedgerIndex) -> list[int]:
    found: list[int] = np.flatnonzero(index.offsets == ABSENT).tolist()
    return found


def read_at(path: Path, offsets: Any) -> Iterator[Completion]:
    places = np.asarray(offsets)
    none = np.zeros(len(places), dtype=np.int32)
    return read_completions(LedgerIndex(places, none, none.astype(bool), (path,), KEY))


def write(path: Path, *completions: Completion) -> None:
    with Ledger(path, KEY) as ledger:
        for completion in completions:
            ledger.append(completion)


def test_lines_are_found_again_by_row_whatever_their_order(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("b", "second"), answer("a", "first\nline \u2028 two"))
    index = index_ledgers((path,), ids("a", "missing", "b"), KEY)
    assert index.finished == 2
    assert missing(index) == [1]
    texts = [completion.text for completion in read_at(path, index.offsets[[0, 2]])]
    assert texts == ["first\nline \u2028 two", "second"]


def test_of_two_lines_for_a_row_the_first_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("a", "first"), answer("a", "again"))
    [kept] = read_at(path, index_ledgers((path,), ids("a"), KEY).offsets)
    assert kept.text == "first"


def test_rows_of_other_datasets_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("elsewhere"))
    assert index_ledgers((path,), ids("a"), KEY).offsets.tolist() == [ABSENT]


@pytest.mark.parametrize("kept_bytes", [1, 10, 60])
def test_a_torn_last_line_is_cut_off_and_its_row_is_missing(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("a"), answer("b"))
    first_line = path.read_bytes().index(b"\n") + 1
    os.truncate(path, first_line + kept_bytes)
    assert missing(index_ledgers((path,), ids("a", "b"), KEY)) == [1]
    write(path, answer("b", "anew"))
    index = index_ledgers((path,), ids("a", "b"), KEY)
    assert [completion.text for completion in read_at(path, index.offsets)] == ["an answer", "anew"]


def test_a_flipped_bit_anywhere_costs_one_row_at_most_and_never_changes_an_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, names = tmp_path / "ledger.jsonl", ("a", "b", "c", "d")
    write(path, *(answer(name, f"answer of {name} \u2028 {{}}") for name in names))
    content = path.read_bytes()
    sound = list(read_at(path, index_ledgers((path,), ids(*names), KEY).offsets))
    assert not caplog.messages
    for place in range(len(content) - 1):  # the last newline gone is a torn line
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        caplog.clear()
        index, row = index_ledgers((path,), ids(*names), KEY), content[:place].count(b"\n")
        assert missing(index) == [row]
        kept = index.only(index.offsets != ABSENT)
        assert list(read_completions(kept)) == sound[:row] + sound[row + 1 :]
        assert f"line {row + 1} is damaged" in caplog.messages[0]


OLD_LINE = (  # as versions without checksums wrote it
    b'{"id":"a","text":"an answer","finish_reason":"stop","prompt_tokens":3,"completion_tokens":2,"seconds":0.5,'
    b'"batch_size":4,"truncated_tokens":0,"error":null}\n'
)


def test_a_ledger_without_checksums_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(OLD_LINE)
    write(path, answer("b"))
    assert path.read_bytes().startswith(OLD_LINE)
    index = index_ledgers((path,), ids("a", "b"), KEY)
    assert list(read_at(path, index.offsets)) == [answer("a"), answer("b")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"an answer"', b"null"), (b'"an answer"', b"7"), (b'"stop"', b'"shop"'), (b'"stop"', b'["stop"]'),
        (b'"completion_tokens":2', b'"completion_tokens":"2"'), (b'"seconds":0.5', b'"seconds":-1'),
        (b'"seconds":0.5', b'"seconds":true'), (b'"error":null', b'"error":[]'), (b'"error":null', b'"error":"lost"'),
        (b'"error":null', b'"errors":null'), (b'"text":"an answer",', b""), (b'"id":"a"', b'"id":5'),
        (b'"id":"a"', b'"id":""'), (OLD_LINE, b"[]\n"), (OLD_LINE, b"null\n"), (OLD_LINE, b"\0" * 80 + b"\n"),
        (b"answer", b"\xff\xfe"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_answer_never_counts_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: bytes, after: bytes
) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("b"))
    path.write_bytes(path.read_bytes() + OLD_LINE.replace(before, after))
    assert missing(index_ledgers((path,), ids("a", "b"), KEY)) == [0]
    assert "ledger.jsonl: line 2 is damaged" in caplog.text
    write(path, answer("a", "asked again"))
    [kept] = read_at(path, index_ledgers((path,), ids("a"), KEY).offsets)
    assert kept.text == "asked again"


def test_repeated_and_strange_lines_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("a"), answer("elsewhere"), answer("a", "again"), answer("nowhere"))
    index_ledgers((path,), ids("a"), KEY)
    assert caplog.messages == [
        f"{path}: lines 2, 4 are of no row of this run: left out",
        f"{path}: line 3 repeats a row that an earlier line has: the earlier one counts",
    ]


def test_a_line_that_is_damaged_after_it_was_found_is_an_error_and_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("a"))
    index = index_ledgers((path,), ids("a"), KEY)
    path.write_bytes(path.read_bytes().replace(b"an answer", b"no answer"))
    with pytest.raises(LedgerCorruptError, match="run the same command again"):
        list(read_completions(index))


def test_a_ledger_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "ledger.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        write(tmp_path / "ledger.jsonl", answer("a"))
    assert (tmp_path / "elsewhere").read_text() == ""


def test_lines_of_another_run_never_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, "f" * 64) as ledger:
        ledger.append(answer("a", "of another model"))
    write(path, answer("b"))
    assert missing(index_ledgers((path,), ids("a", "b"), KEY)) == [0]
    assert "line 1 is damaged (its checksum is not that of its content in this run)" in caplog.text


def test_a_missing_ledger_has_no_rows(tmp_path: Path) -> None:
    assert index_ledgers((tmp_path / "none.jsonl",), ids("a"), KEY).finished == 0


class Syncs:
    """Counts what is really forced to the disk: for each call the file's number and its size then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[tuple[int, int]] = []
        plain = os.fsync

        def counted(descriptor: int) -> None:
            state = os.fstat(descriptor)
            plain(descriptor)
            self.files.append((state.st_ino, state.st_size))

        monkeypatch.setattr(os, "fsync", counted)

    def largest(self, path: Path) -> int:
        number = path.stat().st_ino
        return max((size for file, size in self.files if file == number), default=0)


def test_rows_that_finish_together_reach_the_disk_in_time_without_a_further_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(monkeypatch)
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, KEY, sync_seconds=0.05) as ledger:
        for burst in range(2):
            for number in range(64):
                ledger.append(answer(f"row-{burst}-{number}"))
            deadline = time.monotonic() + 10
            while syncs.largest(path) < path.stat().st_size and time.monotonic() < deadline:
                time.sleep(0.01)
            assert syncs.largest(path) == path.stat().st_size
    assert sum(file == path.stat().st_ino for file, _ in syncs.files) < 64  # not one a row


def test_a_new_ledgers_directory_entry_is_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(monkeypatch)
    with Ledger(tmp_path / "ledger.jsonl", KEY):
        assert tmp_path.stat().st_ino in {file for file, _ in syncs.files}


def test_what_cannot_be_forced_to_the_disk_is_a_clear_error() -> None:
    """The null device takes every line, and the system refuses to force it anywhere."""
    with pytest.raises(StorageError, match="cannot be written"):
        write(Path(os.devnull), answer("a"))
    with pytest.raises(StorageError), Ledger(Path(os.devnull), KEY) as ledger:
        ledger.append(answer("a"))
        ledger.sync()


def test_a_row_after_what_could_not_be_forced_to_the_disk_is_refused() -> None:
    with pytest.raises(StorageError), Ledger(Path(os.devnull), KEY, sync_seconds=0.01) as ledger:
        for number in range(1000):
            ledger.append(answer(f"row-{number}"))
            time.sleep(0.01)
    assert number < 999


def test_a_file_size_limit_is_a_clear_error_and_keeps_whole_lines(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the write fails half-way with a real error of the system."""
    path = tmp_path / "ledger.jsonl"
    script = f"""
import resource, signal
from pathlib import Path
from tasks.core.errors import StorageError
from tasks.core.runs.ledger import Ledger
from tasks.core.records import Completion
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with Ledger(Path({str(path)!r}), {KEY!r}) as ledger:
        for number in range(100):
            ledger.append(Completion(f"row-{{number}}", "x" * 40, "stop", 1, 1, 0.1, 1))
except StorageError as exc:
    print(exc)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot be written" in run.stdout
    assert "rows finished so far are kept" in run.stdout
    content = path.read_bytes()
    assert content.endswith(b"\n")
    names = [f"row-{number}" for number in range(100)]
    assert index_ledgers((path,), ids(*names), KEY).finished == content.count(b"\n") > 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_clear_error_and_the_run_resumes_when_there_is_space(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = tmp_path / "ledger.jsonl"
        script = f"""
from pathlib import Path
from tasks.core.errors import StorageError
from tasks.core.runs.ledger import Ledger
from tasks.core.records import Completion
try:
    with Ledger(Path({str(path)!r}), {KEY!r}) as ledger:
        for number in range(100):
            ledger.append(Completion(f"row-{{number}}", "x" * 3000, "stop", 1, 1, 0.1, 1))
except StorageError as exc:
    print(exc)
"""
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "no space left" in run.stdout
        assert "run the same command again" in run.stdout
        names = [f"row-{number}" for number in range(100)]
        before = index_ledgers((path,), ids(*names), KEY).finished
        assert before > 3
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        write(path, answer(f"row-{before}"))
        assert index_ledgers((path,), ids(*names), KEY).finished == before + 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_ids_are_compared_whole_even_when_one_begins_like_another(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, answer("ab-10"))
    assert missing(index_ledgers((path,), ids("ab-1", "ab-10"), KEY)) == [0]
