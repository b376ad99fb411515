"""Whether a model was trained on what it is tested on: its training data against the rows of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tasks.core.data.preflight import find_overlap
from tasks.core.errors import TuneproofError
from tasks.core.evaluation.summary import OverlapSummary
from tasks.core.files import write_atomically
from tasks.core.records import Example, Message, ModelManifest, Prediction, Record

if TYPE_CHECKING:
    from hashlib import _Hash

CACHE_NAME = "overlap.json"
_QUESTIONS_KEPT = 20
_METHOD = "all user turns, and ids; numbers, contained ones"  # another one makes what was kept worthless


class _Kept(Record):
    """`overlap.json`: what was found for these training and test rows, so that it is looked for once."""

    key: str
    overlap: OverlapSummary


def training_overlap(
    trained: ModelManifest | None, test: Iterable[Prediction], cache_dir: Path
) -> OverlapSummary | str:
    """Test questions that the training data holds, exactly or nearly; text = why they could not be looked for.

    The data is opened again by what the model's manifest says of it; `cache_dir` keeps what was found.
    """
    if trained is None:
        return "the candidate's training is not known"
    rows = [_asked(row) for row in test if row.question]
    key = _key(trained, rows)
    try:
        kept = _Kept.model_validate_json((cache_dir / CACHE_NAME).read_bytes())
        if kept.key == key:
            return kept.overlap
    except (OSError, ValidationError):
        pass
    found = _look(trained, rows)
    if isinstance(found, OverlapSummary):
        write_atomically(
            cache_dir / CACHE_NAME, _Kept(key=key, overlap=found).model_dump_json(indent=2) + "\n"
        )
    return found


def _asked(row: Prediction) -> Example:
    """The row as it was asked: training rows are compared by all their user turns, so must these be."""
    turns = (*row.earlier_turns, Message("user", row.question)) if row.earlier_turns else None
    return Example(
        row.id,
        row.question,
        row.system_prompt,
        row.ground_truth,
        turns,
        other_references=row.other_ground_truths,
    )


def _key(trained: ModelManifest, rows: Iterable[Example]) -> str:
    digest = hashlib.sha256(f"{_METHOD}\n{_dataset_sha256(trained) or trained.training_rows_sha256}".encode())
    for row in rows:
        digest.update(f"{row.id} {len(row.earlier_turns)}\n".encode())
    return digest.hexdigest()


def _look(trained: ModelManifest, rows: list[Example]) -> OverlapSummary | str:
    seen = hashlib.sha256()
    try:
        overlap = find_overlap(_watched(_training_examples(trained), seen), rows)
    except TuneproofError as error:
        return error.what.partition("\n")[0]
    except (OSError, KeyError) as error:
        return f"{trained.training_data_id} cannot be read: {error}"
    if overlap.train_rows != trained.training_row_count + trained.skipped_row_count or (
        _dataset_sha256(trained) not in (None, seen.hexdigest())
    ):
        return f"{trained.training_data_id} has changed since the training"
    return OverlapSummary(
        training_data_id=trained.training_data_id,
        train_rows=overlap.train_rows,
        test_rows=overlap.test_rows,
        exact_test_rows=overlap.exact_test_rows,
        near_test_rows=overlap.near_test_rows,
        share=overlap.share,
        questions=tuple(pair.test_question for pair in overlap.pairs[:_QUESTIONS_KEPT]),
    )


def _dataset_sha256(trained: ModelManifest) -> str | None:
    """Fingerprint of all rows, skipped ones too; older models have one of the learnt rows only."""
    if trained.training_dataset_sha256 is None and trained.skipped_row_count == 0:
        return trained.training_rows_sha256
    return trained.training_dataset_sha256


def _training_examples(trained: ModelManifest) -> Iterator[Example]:
    from tasks.core.data.columns import ColumnMapping, examples
    from tasks.core.data.sources import load_rows

    settings: dict[str, Any] = trained.settings
    rows = load_rows(
        settings.get("training_data_id") or trained.training_data_id,
        split=settings.get("training_data_split"),
        revision=settings.get("training_data_revision"),
        max_rows=settings.get("max_rows"),
    )
    return examples(rows, ColumnMapping.of(settings), told=True)


def _watched(rows: Iterable[Example], seen: _Hash) -> Iterator[Example]:
    """Fingerprint the rows as training does: their ids, one a line."""
    for number, row in enumerate(rows):
        seen.update(("\n" if number else "").encode() + row.id.encode())
        yield row
