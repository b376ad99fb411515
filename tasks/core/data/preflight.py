"""Checks before the long work starts: test questions that training has seen, and room on the disk.

Near duplicates are pairs of questions whose sets of five-word sequences have a Jaccard similarity of
at least `NEAR_SIMILARITY`, counted exactly, not sampled, and pairs of which one holds the other word for
word (at least `CONTAINED_WORDS` words). Sequences that very many test rows share are the wording of a
template, not the content of a question; they do not count. Nor are questions near that ask with other numbers.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.data.formats.limits import size_text
from tasks.core.data.question_words import is_number, question_words
from tasks.core.errors import StorageError
from tasks.core.records import Example

NEAR_SIMILARITY = 0.6
WORDS_IN_SEQUENCE = 5
CONTAINED_WORDS = 6
_LONG_WORDS = 13  # that many words in a row are no common phrase, however long the text around them
_CONTAINED_SHARE = 0.5
_CONTAINED_SEQUENCES = CONTAINED_WORDS - WORDS_IN_SEQUENCE + 1  # so many of them must be more than a template
_TEMPLATE_SHARE = 0.01
_TEMPLATE_ROWS = 10
_MAX_PAIRS = 100
_ROWS_AT_ONCE = 2000
_CONTENT_ID = re.compile(r"([0-9a-f]{16})-\d+\Z")
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
Kind = Literal["exact", "contained", "near"]


@dataclass(frozen=True, slots=True)
class OverlapPair:
    """A test row and the first training row found that asks the same.

    `similarity` is 0 to 1: of near questions that of their sequences, of a contained one its part of the longer.
    """

    kind: Kind
    similarity: float
    train_id: str
    test_id: str
    train_question: str
    test_question: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many test rows ask what training rows ask; `pairs` are the first of them, exact ones first.

    `near_test_rows` counts the contained ones too.
    """

    train_rows: int
    test_rows: int
    exact_test_rows: int
    near_test_rows: int
    pairs: tuple[OverlapPair, ...]

    @property
    def share(self) -> float:
        """Part of the test rows, 0 to 1, whose question is in the training rows, exactly or nearly."""
        return (self.exact_test_rows + self.near_test_rows) / self.test_rows if self.test_rows else 0.0


def find_overlap(train: Iterable[Example], test: Iterable[Example]) -> Overlap:
    """Compare the questions (all user turns of a conversation) in the form of `question_words`.

    Rows whose ids are hashes of the same content are the same too, as where a file of answers lacks earlier turns.
    Rows without a usable question are left out of the comparison but counted. `train` is streamed once;
    memory grows with `test` only.
    """
    index = _TestIndex(list(test))
    rows, train_rows = iter(train), 0
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        train_rows += len(chunk)
        index.match(chunk)
    exact = [pair for pair in index.found.values() if pair.kind == "exact"]
    near = [pair for pair in index.found.values() if pair.kind != "exact"]
    near.sort(key=lambda pair: (pair.kind, -pair.similarity))
    pairs = (*exact, *near)[:_MAX_PAIRS]
    return Overlap(train_rows, index.row_count, len(exact), len(near), pairs)


def check_disk_space(path: Path, needed_bytes: int) -> None:
    """Raise StorageError unless `path`, which need not exist yet, can be a folder with `needed_bytes` free."""
    folder = path.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise StorageError(f"{folder} is a file, and a folder is needed there.", "Name another folder.")
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{path} needs about {size_text(needed_bytes)}, but its disk has {size_text(free_bytes)} free.",
            "Free some space, or choose a folder on another disk.",
        )


def _keys(example: Example, words: Sequence[str]) -> list[int]:
    """What two rows share when they are the same: their words, or the content that their ids are made of."""
    if not words:
        return []
    content = _CONTENT_ID.match(example.id)
    return [hash(tuple(words)), *([hash(content[1])] if content else [])]


def _sequence_hashes(rows: Sequence[Sequence[str]]) -> list[Hashes]:
    """Of each row's words the sorted distinct hashes of all runs of five; none for a shorter text."""
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    # Runs are counted by the row and place of their first word; the last words of a row begin none.
    row_of_word = np.repeat(np.arange(len(rows)), sizes)
    word_count = len(row_of_word)
    count = word_count - WORDS_IN_SEQUENCE + 1
    if count < 1:
        return [np.empty(0, np.uint64) for _ in rows]
    ids = np.fromiter(map(hash, chain.from_iterable(rows)), np.int64, word_count).view(np.uint64)
    mixed = np.zeros(count, np.uint64)
    for offset in range(WORDS_IN_SEQUENCE):
        mixed = (mixed + ids[offset : offset + count]) * _HASH_FACTOR
        mixed ^= mixed >> np.uint64(29)
    is_within = row_of_word[:count] == row_of_word[WORDS_IN_SEQUENCE - 1 :]
    mixed, row_of_run = mixed[is_within], row_of_word[:count][is_within]
    order = np.lexsort((mixed, row_of_run))  # the rows stay in their order
    mixed = mixed[order]
    is_new = np.ones(len(mixed), bool)
    is_new[1:] = (mixed[1:] != mixed[:-1]) | (row_of_run[1:] != row_of_run[:-1])
    ends = np.cumsum(np.bincount(row_of_run[is_new], minlength=len(rows)))
    return np.split(mixed[is_new], ends[:-1])


def _asked_words(example: Example) -> list[str]:
    if example.problem is not None:
        return []
    turns = [turn.content for turn in example.messages or () if turn.role == "user"] or [example.question]
    return question_words("\n".join(turns))


def _other_numbers(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two questions differ in numbers: only in these, or each has one that the other lacks."""
    numbers = [[word for word in words if is_number(word)] for words in (one, other)]
    if numbers[0] == numbers[1]:
        return False
    counts = [Counter(found) for found in numbers]
    if not (counts[0] <= counts[1] or counts[1] <= counts[0]):
        return True
    plain = [[word for word in words if not is_number(word)] for words in (one, other)]
    shorter, longer = sorted((one, other), key=len)
    is_longer = list(longer[: len(shorter)]) == list(shorter) and _goes_on(longer[len(shorter) :])
    return plain[0] == plain[1] or is_longer


def _goes_on(words: Sequence[str]) -> bool:
    """Whether words behind a question only add numbers: "... the sum of 1 and 2" is not "... of 1 and 2 and 3"."""
    return any(map(is_number, words)) and len({word for word in words if not is_number(word)}) <= 1


def _contained_share(one: Sequence[str], other: Sequence[str]) -> float:
    """The shorter's part of the longer that holds it word for word; 0 where none does so in a way that tells."""
    shorter, longer = sorted((one, other), key=len)
    held, text = f"\0{chr(0).join(shorter)}\0", f"\0{chr(0).join(longer)}\0"
    start = text.find(held)
    if start < 0 or len(shorter) < CONTAINED_WORDS:
        return 0.0
    behind = text[start + len(held) :].strip("\0").split("\0")
    return 0.0 if _goes_on(behind) or _other_numbers(shorter, longer) else len(shorter) / len(longer)


@dataclass(frozen=True, slots=True)
class _Known:
    """What test rows have of a training row's sequences: their places in the vocabulary, with and without templates."""

    position: int
    places: Places
    telling: Places
    size: int
    telling_size: int


class _TestIndex:
    """Word sequences of the test rows, and the pairs found so far: the first for each test row."""

    def __init__(self, test: Sequence[Example]) -> None:
        self.row_count = len(test)
        self.found: dict[int, OverlapPair] = {}
        self._test = test
        self._rows_of_text: dict[int, list[int]] = {}
        hashes: list[Hashes] = []
        for start in range(0, len(test), _ROWS_AT_ONCE):
            words = [_asked_words(example) for example in test[start : start + _ROWS_AT_ONCE]]
            for row, asked in enumerate(words, start):
                for key in _keys(test[row], asked):
                    self._rows_of_text.setdefault(key, []).append(row)
            hashes += _sequence_hashes(words)
        self._vocabulary, place, counts = np.unique(_joined(hashes), return_inverse=True, return_counts=True)
        self._counts = counts
        self._is_template = counts > max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * len(test))
        row_of_place = np.repeat(np.arange(len(test)), [len(row) for row in hashes])
        counted = ~self._is_template[place]
        self._sizes = np.bincount(row_of_place[counted], minlength=len(test))
        # The rows that hold sequence k are _rows[_starts[k]:_starts[k + 1]].
        self._rows = row_of_place[np.argsort(place, kind="stable")]
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        self._rows_of_anchor = self._anchors(place, [len(row) for row in hashes])
        self._is_anchor = np.zeros(len(counts), bool)
        self._is_anchor[list(self._rows_of_anchor)] = True

    def _anchors(self, place: Places, sizes: Sequence[int]) -> dict[int, list[int]]:
        """Rows by their rarest sequence: a text that holds all their words holds this one."""
        anchors: dict[int, list[int]] = {}
        start = 0
        for row, size in enumerate(sizes):
            own = place[start : start + size]
            start += size
            if self._sizes[row] >= _CONTAINED_SEQUENCES:
                anchors.setdefault(int(own[self._counts[own].argmin()]), []).append(row)
        return anchors

    def match(self, train: Sequence[Example]) -> None:
        """Record which test rows the rows of `train` ask too."""
        words = [_asked_words(example) for example in train]
        for example, row in zip(train, words, strict=True):
            for match in chain.from_iterable(self._rows_of_text.get(key, ()) for key in _keys(example, row)):
                if match not in self.found or self.found[match].kind != "exact":
                    self.found[match] = self._pair("exact", 1.0, example, match)
        for known in self._known_sequences(_sequence_hashes(words)):
            example, asked = train[known.position], words[known.position]
            if len(known.telling) >= NEAR_SIMILARITY * known.telling_size:
                self._match_near(example, asked, known)
            self._match_contained(example, asked, known)

    def _known_sequences(self, hashes: Sequence[Hashes]) -> Iterator[_Known]:
        """Of the rows that have anything in common with test rows, which sequences these are."""
        flat = _joined(hashes)
        if not len(flat) or not len(self._vocabulary):
            return
        places = np.minimum(np.searchsorted(self._vocabulary, flat), len(self._vocabulary) - 1)
        is_known = self._vocabulary[places] == flat
        is_template = is_known & self._is_template[places]
        is_telling = is_known & ~is_template
        start = 0
        for position, row in enumerate(hashes):
            span = slice(start, start + len(row))
            start += len(row)
            telling = places[span][is_telling[span]]
            if len(telling):
                telling_size = len(row) - int(np.count_nonzero(is_template[span]))
                yield _Known(position, places[span][is_known[span]], telling, len(row), telling_size)

    def _holders(self, place: int) -> Places:
        return self._rows[self._starts[place] : self._starts[place + 1]]

    def _match_near(self, example: Example, words: Sequence[str], known: _Known) -> None:
        rows = np.concatenate([self._holders(place) for place in known.telling.tolist()])
        shared = np.bincount(rows, minlength=self.row_count)
        similarity = shared / np.maximum(1, known.telling_size + self._sizes - shared)
        for row in np.flatnonzero(similarity >= NEAR_SIMILARITY).tolist():
            if row not in self.found and not _other_numbers(words, _asked_words(self._test[row])):
                self.found[row] = self._pair("near", float(similarity[row]), example, row)

    def _match_contained(self, example: Example, words: Sequence[str], known: _Known) -> None:
        """Test rows of which the row holds all, then those that hold all of the row."""
        rows = [
            row
            for place in known.telling[self._is_anchor[known.telling]].tolist()
            for row in self._rows_of_anchor[place]
        ]
        if len(known.places) == known.size and len(known.telling) >= _CONTAINED_SEQUENCES:
            rows += self._holders(int(known.places[self._counts[known.places].argmin()])).tolist()
        for row in rows:
            if row in self.found:
                continue
            asked = _asked_words(self._test[row])
            share = _contained_share(words, asked)
            # A short instruction is not the question that it stands in.
            if share and (len(asked) <= len(words) or len(words) >= _LONG_WORDS or share >= _CONTAINED_SHARE):
                self.found[row] = self._pair("contained", share, example, row)

    def _pair(self, kind: Kind, similarity: float, train: Example, row: int) -> OverlapPair:
        test = self._test[row]
        return OverlapPair(kind, similarity, train.id, test.id, train.question, test.question)


def _joined(hashes: Sequence[Hashes]) -> Hashes:
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
