"""The rows of a run: ids are kept whole, and what cannot be told apart is refused before anything is asked."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tasks.core.errors import DataError, StorageError
from tasks.core.records import Completion, Example, Message
from tasks.core.runs.ledger import Ledger, index_ledgers
from tasks.core.runs.rows import LONGEST_ID_BYTES, RunRows, index_rows


def rows(*ids: str) -> RunRows:
    return index_rows(lambda: (Example(row_id, "a question") for row_id in ids))


def test_long_ids_of_a_users_own_are_found_again_in_the_ledger(tmp_path: Path) -> None:
    indexed = rows(*(f"customer-questions-2024-row-{number:06d}" for number in range(4)), "a", "ü" * 100)
    with Ledger(tmp_path / "ledger.jsonl", "key") as ledger:
        for row_id in indexed.ids:
            ledger.append(Completion(row_id.decode(), "an answer", "stop", 1, 1, 0.1, 1))
    assert indexed.ids[-1].decode() == "ü" * 100
    assert index_ledgers((tmp_path / "ledger.jsonl",), indexed.ids, "key").finished == 6


@pytest.mark.parametrize("row_id", ["", "x" * (LONGEST_ID_BYTES + 1)])
def test_an_id_that_cannot_be_kept_is_named_with_its_row(row_id: str) -> None:
    with pytest.raises(DataError, match=f"row 2 has {len(row_id)} bytes"):
        rows("a", row_id)


def test_an_id_that_occurs_twice_is_refused() -> None:
    with pytest.raises(DataError, match="2 rows have the id of another row, for example 'b'"):
        rows("a", "b", "c", "b", "b")


def test_no_rows_are_no_error() -> None:
    assert len(rows()) == 0


@pytest.mark.parametrize("most_bytes", [0, 5000, 10**9])
def test_rows_are_given_as_they_were_read_as_often_as_they_are_asked_for(
    most_bytes: int, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr("tasks.core.runs.kept_rows.MOST_BYTES_KEPT", most_bytes)
    turns = (Message("user", "Rome"), Message("assistant", "Italy", "thoughts"), Message("user", "Bern"))
    read = [
        Example(f"id-{n}", f"question {n}", reference=str(n), messages=turns if n % 2 else None)
        for n in range(2500)
    ]
    indexed = index_rows(lambda: iter(read))
    first, second = indexed.examples(), indexed.examples()
    assert [next(first), next(second), next(first)] == [read[0], read[0], read[1]]
    assert list(first) == read[2:] and list(second) == read[1:]
    assert list(indexed.only({3, 2400}).examples()) == [read[3], read[2400]]


@pytest.mark.parametrize(("most_bytes", "travels"), [(0, False), (10**9, True)])
def test_rows_travel_to_another_process_unless_they_are_too_many(
    most_bytes: int, travels: bool, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr("tasks.core.runs.kept_rows.MOST_BYTES_KEPT", most_bytes)
    indexed = rows("a", "b")
    there = pickle.loads(pickle.dumps(indexed))
    assert (there.ids.tolist(), there.rows_sha256) == (indexed.ids.tolist(), indexed.rows_sha256)
    assert there.are_here is travels
    if travels:
        assert list(there.examples()) == list(indexed.examples())
    assert indexed.are_here


def test_rows_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.core.runs.kept_rows.MOST_BYTES_KEPT", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="too many for memory"):
        rows("a", "b")
