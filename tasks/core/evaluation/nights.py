"""Many nights: how often a model was challenged on the same rows, and what that asks of the next challenger.

Whoever challenges one champion on one test set every night will once be better by luck alone. So each challenge may
use a part of the error only: `gate.challenges` of them share twice the error of a single two-sided test, that is one
such error on the side on which models are promoted (Bonferroni's inequality, so however they depend on each other),
and every further as many share half as much again. A challenge is a look at new answers: the same answers looked at
again are the same challenge. `challenges.jsonl` beside the history of promotions keeps them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from filelock import FileLock
from pydantic import ValidationError

from tasks.core.errors import EvaluationError, StorageError
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import Challenge, MetricComparison, Opponent, RunSummary
from tasks.core.files import storage_error, write_atomically
from tasks.core.provenance import now
from tasks.core.records import Record
from tasks.core.storage.store import Store
from tasks.core.storage.versions import Version, read_version, replace_version

logger = logging.getLogger(__name__)

CHALLENGES_NAME = "challenges.jsonl"
COUNT_NAME = "challenges.json"
_SKETCH_HASHES = 512
_SAME_ROWS = 0.5
_LOCK_SECONDS = 60.0
_TRIES = 20
_LOOKS_BEFORE = 5  # as if so many had shown nothing: one look alone cannot say how much challengers differ


class Look(Record):
    """One line of `challenges.jsonl`: a candidate's answers compared with an opponent's on a set of rows.

    `opponent` and `candidate` are digests, of the opponent's weights and of the candidate's answers. `rows` are the
    smallest of the rows' hashes (questions with references), by which sets of rows are compared. `previous` is the
    sha256 of the line before; None in the first line, and in those of earlier versions.
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
    previous: str | None = None


class Count(Record):
    """`challenges.json`: how many lines the book has at least, and the sha256 of the last of them."""

    lines: int
    last_sha256: str


@dataclass(frozen=True, slots=True)
class ChallengeBook:
    """The looks that were taken at test sets, in the directory or at the URL of the models."""

    models: Store

    def enter(self, look: Look) -> tuple[int, tuple[Look, ...]]:
        """Write a look down; give its number among those at its opponent on its rows, and these, this one included.

        A look at answers that were looked at before keeps its number. Raises StorageError, and EvaluationError that
        names what is damaged.
        """
        if self.models.is_remote:
            return self._enter_there(look)
        directory = self.models.local
        path = directory / CHALLENGES_NAME
        if not directory.is_dir():
            return 1, (look,)  # no model was ever trained or promoted here
        try:
            with FileLock(directory / ".challenges.lock", timeout=_LOCK_SECONDS):
                lines, torn_bytes = self._read()
                earlier, known = _challenges(lines, look)
                if known is None:
                    line = _next_line(lines, look)
                    _append(path, line, torn_bytes)
                    lines.append(line)
                _write_count(directory / COUNT_NAME, lines)
        except OSError as error:
            raise storage_error(error, path, "it tells how often a champion was challenged") from error
        return _numbered(earlier, known, look)

    def _enter_there(self, look: Look) -> tuple[int, tuple[Look, ...]]:
        """The same at a URL: the book is written only to the version that was read, and read again where it grew."""
        for _ in range(_TRIES):
            lines, torn_bytes, version = self._read_there()
            earlier, known = _challenges(lines, look)
            if known is not None:
                return _numbered(earlier, known, look)
            line, content = _next_line(lines, look), version.content or b""
            content = content[: len(content) - torn_bytes]
            ended = not content or content.endswith(b"\n")
            content += line + b"\n" if ended else b"\n" + line + b"\n"
            if replace_version(self.models, CHALLENGES_NAME, content, version):
                count = Count(lines=len(lines) + 1, last_sha256=_sha256(line))
                self.models.write(COUNT_NAME, (count.model_dump_json() + "\n").encode())
                return _numbered(earlier, known, look)
        raise StorageError(
            f"{self.models.address_of(CHALLENGES_NAME)} was changed by others at each of {_TRIES} tries",
            "run the same command again",
        )

    def check(self) -> None:
        """Raise EvaluationError when the book is damaged."""
        if self.models.is_remote:
            self._read_there()
        else:
            self._read()

    def _read(self) -> tuple[list[bytes], int]:
        """The whole lines, and how many bytes of an addition that was cut off follow them."""
        path, count_path = (self.models.local / name for name in (CHALLENGES_NAME, COUNT_NAME))
        count = count_path.read_bytes() if count_path.is_file() else None
        return _checked(path, path.read_bytes() if path.is_file() else b"", count)

    def _read_there(self) -> tuple[list[bytes], int, Version]:
        count = self.models.read(COUNT_NAME)  # first: the book only grows
        version = read_version(self.models, CHALLENGES_NAME)
        address = self.models.address_of(CHALLENGES_NAME)
        return *_checked(address, version.content or b"", count), version


def _checked(path: Path | str, content: bytes, count: bytes | None) -> tuple[list[bytes], int]:
    *ended, rest = content.split(b"\n")
    lines = [line for line in ended if line.strip()]
    if rest and _look(rest) is not None:
        lines, rest = [*lines, rest], b""  # only its newline is missing
    _check_lines(path, lines)
    if count is not None:  # none of an earlier version, or of no look yet
        _check_count(path, lines, count)
    return lines, len(rest)


def _next_line(lines: Sequence[bytes], look: Look) -> bytes:
    previous = _sha256(lines[-1]) if lines else None
    return orjson.dumps(look.model_copy(update={"previous": previous}).model_dump())


def _numbered(earlier: Sequence[Look], known: int | None, look: Look) -> tuple[int, tuple[Look, ...]]:
    if known is not None:
        return known + 1, (*earlier[:known], look)
    return len(earlier) + 1, (*earlier, look)


def _check_lines(path: Path | str, lines: Sequence[bytes]) -> None:
    """Raise EvaluationError that names a line which is no look, or does not follow the one before it."""
    before: str | None = None
    for number, line in enumerate(lines, start=1):
        look = _look(line)
        if look is None:
            raise _damaged(path, f"line {number} is damaged")
        if look.previous is not None and look.previous != before:
            raise _damaged(
                path, f"the line before line {number} is gone or was changed, or it is there twice"
            )
        before = _sha256(line)


def _check_count(path: Path | str, lines: Sequence[bytes], content: bytes) -> None:
    """Raise EvaluationError when lines are gone from the end, or the last one that was counted is another now."""
    try:
        count = Count.model_validate_json(content)
    except ValidationError:
        raise _damaged(path, f"{COUNT_NAME} beside it cannot be read") from None
    if count.lines > len(lines):
        where = f"it has {len(lines)} lines" if lines else "it is missing or empty"
        raise _damaged(
            path, f"{where}, but there were {count.lines} challenges (line {len(lines) + 1} is gone)"
        )
    if count.lines < 1 or _sha256(lines[count.lines - 1]) != count.last_sha256:
        raise _damaged(path, f"line {max(1, count.lines)} is not the one that was written ({COUNT_NAME})")


def _damaged(path: Path | str, why: str) -> EvaluationError:
    return EvaluationError(
        f"{path}, which counts the challenges of each champion, is damaged: {why}",
        f"put it back from a copy; or move it and {COUNT_NAME} away: the count then begins anew, and a model that is "
        "no better is promoted more easily",
    )


def _write_count(path: Path, lines: Sequence[bytes]) -> None:
    count = Count(lines=len(lines), last_sha256=_sha256(lines[-1]))
    content = count.model_dump_json() + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_atomically(path, content)


def _append(path: Path, line: bytes, torn_bytes: int) -> None:
    """Add a line to the book in place of a torn one, or nothing."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - torn_bytes
        if torn_bytes:
            logger.warning("%s: an addition of %d bytes was cut off and is left out", path, torn_bytes)
            file.truncate(size)
        ended = not size or path.read_bytes()[size - 1 :] == b"\n"
        try:
            view = memoryview(line + b"\n" if ended else b"\n" + line + b"\n")
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _challenges(lines: Iterable[bytes], look: Look) -> tuple[list[Look], int | None]:
    """Earlier looks at the same opponent on the same rows, each candidate once; which of them this one repeats."""
    found: dict[str, Look] = {}
    for one in filter(None, map(_look, lines)):
        if one.opponent == look.opponent and overlap(one.rows, look.rows) >= _SAME_ROWS:
            found.setdefault(one.candidate, one)
    return list(found.values()), next((i for i, name in enumerate(found) if name == look.candidate), None)


def _look(line: bytes) -> Look | None:
    try:
        return Look.model_validate_json(line)
    except ValidationError:
        return None


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()


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
