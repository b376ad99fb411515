"""The rows that are scored and shown: answers without the thoughts that a file may still hold in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tasks.core.prompts.thoughts import KNOWN_MARKERS, ThoughtMarkers, opens_with, split
from tasks.core.records import Prediction
from tasks.core.runs.published import read_predictions

_LEAST_SHARE_INSIDE = 0.5


def read_answers(path: Path, setting: Sequence[str] | None = None) -> Iterator[Prediction]:
    """The predictions of a file, each with its answer apart from its thoughts; references without thoughts too.

    `setting` are the markers in turn: None takes the well-known ones and leaves rows alone that were split when
    they were generated, an empty one leaves everything as it is. Where most answers of a file end their thoughts
    without beginning them, the opening marker stood in the prompt: answers without any marker were then cut in
    their thoughts. Raises DataError like `read_predictions`.
    """
    markers = KNOWN_MARKERS if setting is None else ThoughtMarkers.from_setting(setting)
    inside = bool(markers) and _begin_inside(path, _state(path), markers, setting is None)
    for row in read_predictions(path):
        yield _split_row(row, markers, inside, setting is None) if markers else row


def _split_row(row: Prediction, markers: ThoughtMarkers, inside: bool, leaves_own: bool) -> Prediction:
    changes = _without_thoughts_in_references(row, _markers_of_references(row, markers, leaves_own))
    if row.error is None and not _is_split(row, leaves_own):
        found = split(row.predicted_answer, markers)
        if found.pair is None and inside and row.reasoning is None and row.predicted_answer:
            found = split(row.predicted_answer, markers, starts_inside=True)
        is_cut = found.is_cut or _ended_in_thoughts(row)
        if found.pair is not None or is_cut:
            thoughts = [text for text in (row.reasoning, found.reasoning) if text]
            changes["predicted_answer"] = found.answer
            changes["reasoning"] = "\n\n".join(dict.fromkeys(thoughts)) or None
            changes["metadata"] = row.metadata.model_copy(update={"is_cut_in_thoughts": is_cut})
    return row.model_copy(update=changes) if changes else row


def _markers_of_references(row: Prediction, markers: ThoughtMarkers, leaves_own: bool) -> ThoughtMarkers:
    """References are read as the answer was: by the markers that generation was given, if it was given some."""
    own = row.metadata.generation_config.get("thought_markers") if leaves_own else None
    return ThoughtMarkers.from_setting(own) if isinstance(own, list) else markers


def _without_thoughts_in_references(row: Prediction, markers: ThoughtMarkers) -> dict[str, object]:
    changes: dict[str, object] = {}
    if row.ground_truth is not None:
        first, *others = (_answer_in(text, markers) for text in row.references)
        if (first, *others) != row.references:
            changes = {"ground_truth": first, "other_ground_truths": tuple(others)}
    return changes


def _answer_in(reference: str, markers: ThoughtMarkers) -> str:
    found = split(reference, markers)
    return reference if found.is_cut else found.answer


def _is_split(row: Prediction, leaves_own: bool) -> bool:
    """Whether generation has split the row already, or was told not to and nothing else is asked for now."""
    if "is_cut_in_thoughts" in row.metadata.model_fields_set:
        return True
    return leaves_own and "thought_markers" in row.metadata.generation_config


def _ended_in_thoughts(row: Prediction) -> bool:
    """Whether a server that keeps thoughts apart gave nothing else before the token limit."""
    limit = row.metadata.finish_reason in (None, "length")
    return bool(row.reasoning) and not row.predicted_answer.strip() and limit


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # reading it says so
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=64)
def _begin_inside(path: Path, _state: tuple[int, int], markers: ThoughtMarkers, leaves_own: bool) -> bool:
    """Whether most answers of a file end thoughts that they do not begin."""
    answers = inside = 0
    if not path.exists():
        return False
    for row in read_predictions(path):
        if row.error is None and not _is_split(row, leaves_own) and row.predicted_answer:
            pair = split(row.predicted_answer, markers).pair
            answers += 1
            inside += pair is not None and not opens_with(row.predicted_answer, pair)
    return inside > _LEAST_SHARE_INSIDE * answers
