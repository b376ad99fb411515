"""The rows of a run: ids are kept whole, and what cannot be told apart is refused before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.core.records import Completion, Example
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
