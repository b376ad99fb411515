"""Many nights: how often a model was challenged on the same rows, and what that asks of the next challenger.

Whoever challenges one champion on one test set every night will once be better by luck alone. So each challenge may
use a part of the error only: `gate.challenges` of them share twice the error of a single two-sided test, that is one
such error on the side on which models are promoted (Bonferroni's inequality, so however they depend on each other),
and every further as many share half as much again. A challenge is a look at new answers: the same answers looked at
again are the same challenge. `challenges.jsonl` beside the history of promotions keeps them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from filelock import FileLock
from pydantic import ValidationError

from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import Challenge, MetricComparison, Opponent, RunSummary
from tasks.core.files import storage_error
from tasks.core.provenance import now
from tasks.core.records import Record
from tasks.core.storage.store import Store

CHALLENGES_NAME = "challenges.jsonl"
_SKETCH_HASHES = 512
_SAME_ROWS = 0.5
_LOCK_SECONDS = 60.0
_LOOKS_BEFORE = 5  # as if so many had shown nothing: one look alone cannot say how much challengers differ


class Look(Record):
    """One line of `challenges.jsonl`: a candidate's answers compared with an opponent's on a set of rows.

    `opponent` and `candidate` are digests, of the opponent's weights and of the candidate's answers. `rows` are the
    smallest of the rows' hashes (questions with references), by which sets of rows are compared.
    """

    at: str
    opponent: str
    opponent_run: str
    candidate: str
    candidate_run: str
    row_count: int
    rows: tuple[str, ...]
    metric: str
    difference: float | None
    standard_error: float | None
    p_value: float | None


@dataclass(frozen=True, slots=True)
class ChallengeBook:
    """The looks that were taken at test sets, in the directory or at the URL of the models."""

    models: Store

    def enter(self, look: Look) -> tuple[int, tuple[Look, ...]]:
        """Write a look down; give its number among those at its opponent on its rows, and these, this one included.

        A look at answers that were looked at before keeps its number. A line that cannot be read counts as a look: a
        damaged book may make the gate stricter, never more lenient. Raises StorageError.
        """
        directory = self.models.local
        path = directory / CHALLENGES_NAME
        if not self.models.is_remote and not directory.is_dir():
            return 1, (look,)  # no model was ever trained or promoted here
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / ".challenges.lock", timeout=_LOCK_SECONDS):
                self.models.pull(only=[CHALLENGES_NAME])
                content = path.read_bytes() if path.is_file() else b""
                earlier, unreadable = _challenges(content, look)
                known = next((i for i, one in enumerate(earlier) if one.candidate == look.candidate), None)
                if known is not None:
                    return known + 1 + unreadable, (*earlier[:known], look)
                torn = b"" if not content or content.endswith(b"\n") else b"\n"
                _append(path, torn + orjson.dumps(look.model_dump(), option=orjson.OPT_APPEND_NEWLINE))
                self.models.push([path])
        except OSError as error:
            raise storage_error(error, path, "it tells how often a champion was challenged") from error
        return len(earlier) + 1 + unreadable, (*earlier, look)


def _append(path: Path, line: bytes) -> None:
    """Add a line to the book, or nothing: what a full disk took of it would count as a look of its own."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            view = memoryview(line)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _challenges(content: bytes, look: Look) -> tuple[list[Look], int]:
    """Earlier looks at the same opponent on the same rows, each candidate once; and how many lines are unreadable."""
    found: dict[str, Look] = {}
    unreadable = 0
    for line in filter(bytes.strip, content.split(b"\n")):
        try:
            one = Look.model_validate_json(line)
        except ValidationError:
            unreadable += 1
            continue
        if one.opponent == look.opponent and overlap(one.rows, look.rows) >= _SAME_ROWS:
            found.setdefault(one.candidate, one)
    return list(found.values()), unreadable


def look_at(
    candidate: RunSummary, opponent: RunSummary, compared: MetricComparison, table: ScoreTable
) -> Look:
    """The look that this comparison is; `table` holds the candidate's rows."""
    identity = (
        opponent.identity
    )  # a file of answers is known by its name: a row more or less is no other opponent
    weights = (
        f"file {opponent.run_name}"
        if identity is None
        else f"{identity.model.weights_sha256} {identity.model.adapter_sha256}"
    )
    return Look(
        at=now(),
        opponent=hashlib.sha256(weights.encode()).hexdigest()[:32],
        opponent_run=opponent.run_name,
        candidate=candidate.predictions_sha256[:32],
        candidate_run=candidate.run_name,
        row_count=table.row_count,
        rows=sketch(zip(table.questions.tolist(), table.references.tolist(), strict=True)),
        metric=compared.name,
        difference=compared.difference,
        standard_error=compared.standard_error,
        p_value=compared.p_value,
    )


def sketch(rows: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """The smallest hashes of a set of rows, ascending: enough to tell how much of it another set shares."""
    hashes = {
        hashlib.blake2b(f"{question} {reference}".encode(), digest_size=4).hexdigest()
        for question, reference in rows
    }
    return tuple(sorted(hashes)[:_SKETCH_HASHES])


def overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """Estimate which part (0 to 1) of the smaller set of rows the larger one holds, from their sketches.

    Below the smaller of both largest hashes each sketch knows all hashes of its set (bottom-k sketches, Cohen and
    Kaplan 2007); a sketch that is not full knows its whole set.
    """
    if not one or not other:
        return 0.0
    full = [hashes[-1] for hashes in (one, other) if len(hashes) >= _SKETCH_HASHES]
    known = min(full, default=None)
    first, second = ({h for h in hashes if known is None or h <= known} for hashes in (one, other))
    return len(first & second) / max(1, min(len(first), len(second)))


def allowed_p_value(number: int, challenges: int, confidence: float, against: Opponent) -> float:
    """The two-sided p value up to which challenge `number` (from 1) may promote.

    The first model that challenges its base, or a run that a person named, is judged as if nobody came after it.
    """
    error = 1 - confidence
    if number == 1 and against != "champion":
        return error
    return min(error, 2 * error / challenges * 0.5 ** ((number - 1) // challenges))


def challenge_of(
    look: Look,
    number: int,
    looks: Sequence[Look],
    *,
    challenges: int,
    confidence: float,
    against: Opponent,
) -> Challenge:
    """What the gate is told about this challenge."""
    return Challenge(
        number=number,
        challenges=challenges,
        allowed_p_value=allowed_p_value(number, challenges, confidence, against),
        expected_difference=expected_difference(look, looks),
    )


def expected_difference(look: Look, looks: Iterable[Look]) -> float | None:
    """The difference to expect on fresh rows: the seen one, shrunken towards none; None where it is not known.

    Challengers differ from their opponent by normal amounts whose variance is what their seen differences vary more
    than their standard errors explain (empirical Bayes; Efron and Morris 1973, positive part), with a few looks that
    showed nothing added. The best of many looks is the one that luck favoured: the more of them showed nothing, the
    less of a large one is believed.
    """
    seen = [
        (one.difference, one.standard_error)
        for one in looks
        if one.metric == look.metric and one.difference is not None and one.standard_error is not None
    ]
    if look.difference is None or look.standard_error is None or not seen:
        return None
    excess = sum(difference**2 - error**2 for difference, error in seen) / (len(seen) + _LOOKS_BEFORE)
    variance = max(0.0, excess)
    total = variance + look.standard_error**2
    return look.difference if total == 0 else look.difference * variance / total
