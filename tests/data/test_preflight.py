"""Test questions that training has seen are found; a full disk is noticed before the work starts."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.data.preflight import (
    CONTAINED_WORDS,
    NEAR_SIMILARITY,
    WORDS_IN_SEQUENCE,
    Overlap,
    check_disk_space,
    find_overlap,
)
from tasks.core.errors import StorageError
from tasks.core.records import Example, Message

LONG = (
    "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May so "
    "how many clips did Natalia sell altogether in April and May"
)


def _examples(*questions: str) -> list[Example]:
    return [Example(f"row-{number}", question) for number, question in enumerate(questions)]


def test_equal_questions_are_exact_whatever_their_case_space_and_punctuation() -> None:
    overlap = find_overlap(_examples("What is  2 + 2?", "Other"), _examples("what is (2 + 2)", "New"))
    assert (overlap.exact_test_rows, overlap.near_test_rows, overlap.share) == (1, 0, 0.5)
    (pair,) = overlap.pairs
    assert (pair.kind, pair.train_question, pair.test_question) == (
        "exact",
        "What is  2 + 2?",
        "what is (2 + 2)",
    )


def test_a_question_with_one_word_changed_is_near() -> None:
    overlap = find_overlap(
        _examples("something else", LONG), _examples(LONG.replace("friends", "colleagues"))
    )
    assert (overlap.exact_test_rows, overlap.near_test_rows) == (0, 1)
    assert overlap.pairs[0].train_id == "row-1"
    assert NEAR_SIMILARITY <= overlap.pairs[0].similarity < 1


def test_other_questions_do_not_overlap() -> None:
    overlap = find_overlap(
        _examples(LONG, "What is the capital of France?"), _examples("What is the capital of Peru?")
    )
    assert (overlap.share, overlap.pairs) == (0.0, ())


def test_scripts_without_case_or_spaces_are_compared_too() -> None:
    overlap = find_overlap(
        _examples("法国的首都是什么\uff1f", "Straße"), _examples("法国的首都是什么", "STRASSE")
    )
    assert overlap.exact_test_rows == 2


def test_each_test_row_counts_once_and_exact_beats_near() -> None:
    train = _examples(LONG.replace("friends", "colleagues"), LONG, LONG)
    overlap = find_overlap(train, _examples(LONG, LONG))
    assert (overlap.exact_test_rows, overlap.near_test_rows, len(overlap.pairs)) == (2, 0, 2)


def test_conversations_are_compared_by_all_their_user_turns() -> None:
    def chat(first: str) -> Example:
        turns = (Message("user", first), Message("assistant", "ok"), Message("user", "go on"))
        return Example("id", "go on", messages=turns)

    assert find_overlap([chat("tell me of Rome")], [chat("tell me of Athens")]).share == 0
    assert find_overlap([chat("tell me of Rome")], [chat("Tell me of Rome!")]).share == 1


def test_rows_of_the_same_content_are_found_by_their_ids_where_earlier_turns_are_lacking() -> None:
    turns = (Message("user", "tell me of Rome"), Message("assistant", "ok"), Message("user", "go on"))
    train = [Example("0123456789abcdef-0", "go on", messages=turns)]
    assert find_overlap(train, [Example("0123456789abcdef-3", "go on")]).exact_test_rows == 1
    assert find_overlap(train, [Example("fedcba9876543210-0", "go on")]).exact_test_rows == 0


def test_rows_without_a_question_never_match() -> None:
    bad = [Example("a", "", problem="the question is empty"), Example("b", "?!")]
    overlap = find_overlap(bad, bad)
    assert (overlap.train_rows, overlap.test_rows, overlap.share) == (2, 2, 0.0)
    assert find_overlap([], []).share == 0.0


def test_the_wording_of_a_template_does_not_make_questions_near() -> None:
    def question(number: int) -> str:
        frame = "You are given a list of numbers and your task is to add them up and to print only the sum of them all:"
        return f"{frame} {number} {number * 7 % 1000} {number * 13 % 1000} {number * 17 % 1000} {number * 19 % 1000}"

    train = _examples(*(question(number) for number in range(500)))
    overlap = find_overlap(train, _examples(*(question(number) for number in range(495, 800))))
    assert (overlap.exact_test_rows, overlap.near_test_rows) == (5, 0)


def test_the_pairs_shown_are_bounded() -> None:
    rows = _examples(*(f"question number {number}" for number in range(500)))
    overlap = find_overlap(rows, rows)
    assert overlap.exact_test_rows == 500
    assert len(overlap.pairs) == 100


few_words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=14).map(" ".join)


@settings(deadline=None)
@given(train=st.lists(few_words, max_size=8), test=st.lists(few_words, max_size=8))
def test_counts_equal_those_of_comparing_every_pair(train: list[str], test: list[str]) -> None:
    def sequences(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + WORDS_IN_SEQUENCE]) for i in range(len(words) - WORDS_IN_SEQUENCE + 1)}

    def is_near(a: str, b: str) -> bool:
        one, other = sequences(a), sequences(b)
        return bool(one and other) and len(one & other) / len(one | other) >= NEAR_SIMILARITY

    def is_contained(a: str, b: str) -> bool:
        shorter, longer = sorted((a.split(), b.split()), key=len)
        runs = [longer[i : i + len(shorter)] for i in range(len(longer) - len(shorter) + 1)]
        # As many different sequences as that many words have where none comes twice.
        known = len(sequences(" ".join(shorter))) > CONTAINED_WORDS - WORDS_IN_SEQUENCE
        part = len(a.split()) <= len(b.split()) or len(b.split()) >= max(13, len(a.split()) / 2)
        return known and shorter in runs and (part or len(b.split()) >= len(a.split()) / 2)

    exact = [text for text in test if text in train]
    near = [
        text
        for text in test
        if text not in train and any(is_near(text, other) or is_contained(text, other) for other in train)
    ]
    overlap = find_overlap(_examples(*train), _examples(*test))
    assert (overlap.exact_test_rows, overlap.near_test_rows) == (len(exact), len(near))


def _kind(train: str, test: str) -> str | None:
    """How one test row, among others that have nothing to do with it, is found."""
    overlap = find_overlap(_examples("Who wrote Hamlet?", train), _examples("Name a river in Asia.", test))
    return overlap.pairs[0].kind if overlap.pairs else None


CAPITAL = "What is the capital of France?"
HAN = "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u4ec0\u4e48"  # "what is the capital of France"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("\uff37\uff48\uff41\uff54 is the capital of France?", CAPITAL),
        ("What is the cap\u200bital of\u00a0Fran\u00adce?\ufeff", CAPITAL),
        ("7. What is the capital of France?", CAPITAL),
        ("Who said \u201cto be\u201d \u2013 and when?", 'Who said "to be" - and when?'),
        ("Is the caf\u00e9 open?", "Is the cafe\u0301 open?"),
        ("How many are 1,000 and 2?", "how many are 1000 and 2"),
        ("What is 5 \u2212 3?", "What is 5 - 3"),
        (HAN, HAN[:5] + " " + HAN[5:] + "\uff1f"),
    ],
)
def test_the_same_question_in_another_form_is_exact(train: str, test: str) -> None:
    assert _kind(train, test) == "exact"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("What is 2 + 2?", "What is 2 - 2?"),
        ("What is -3 squared?", "What is 3 squared?"),
        ("Round 3.14 up", "Round 314 up"),
        ("Is x < 3 here?", "Is x > 3 here?"),
        ("Say hello in C++", "Say hello in C"),
        ("\u0915\u0940", "\u0915\u093e"),  # Devanagari, only the vowel sign differs
        ("\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"),  # Thai, the same
    ],
)
def test_operators_signs_and_vowel_signs_are_content(train: str, test: str) -> None:
    assert _kind(train, test) is None


@pytest.mark.parametrize(
    "around", ["Answer in one word: {}", "{} Think first, then answer.", "Hi! {} Thank you."]
)
def test_a_question_within_a_longer_one_is_found_either_way(around: str) -> None:
    assert _kind(around.format(CAPITAL), CAPITAL) == "contained"
    assert _kind(CAPITAL, around.format(CAPITAL)) == "contained"
    assert _kind(LONG, around.format(LONG)) in ("contained", "near")
    assert _kind(HAN, around.format(HAN)) == "contained"


def test_a_question_in_the_middle_of_a_long_training_text_is_found() -> None:
    filling = " ".join(f"filler{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" * 20)
    assert _kind(f"{filling} {CAPITAL} {filling}", CAPITAL) == "contained"
    assert _kind(LONG, f"{filling} {LONG} {filling}") == "contained"


def test_a_common_phrase_or_a_short_instruction_within_a_question_is_no_overlap() -> None:
    assert _kind("What is it?", f"What is it? {LONG}") is None
    assert _kind(f"What is it? {LONG}", "What is it?") is None
    assert (
        _kind(
            "Summarize the following text in one sentence:",
            f"Summarize the following text in one sentence: {LONG}",
        )
        is None
    )
    assert _kind("What is the capital of Peru?", "Tell me: what is the capital of France?") is None


def test_an_instruction_that_many_test_rows_begin_with_is_no_overlap() -> None:
    frame = "Classify the sentiment of the following review as positive or negative or neutral, in one single word:"
    tests = _examples(*(f"{frame} it was {letter}{other}" for letter in "abcdef" for other in "ghijkl"))
    assert find_overlap(_examples(frame), tests).share == 0


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Add 2 and 3.", "Add 4 and 5."),
        (LONG + " if it is 7 on each day", LONG.replace("48", "62") + " if it is 7 on each day"),
        (f"{LONG} of 2 and 3 and 4", f"{LONG} of 3 and 2 and 4"),
        ("Sort these numbers from low to high: 5 3 8", "Sort these numbers from low to high: 5 3 8 1"),
        ("What is the sum of 12 and 3?", "What is the sum of 12 and 3 and 4?"),
        (f"{HAN * 3}2{HAN * 3}", f"{HAN * 3}5{HAN * 3}"),
    ],
)
def test_questions_that_ask_with_other_numbers_are_new(train: str, test: str) -> None:
    assert _kind(train, test) is None
    assert _kind(test, train) is None


def test_scripts_without_blanks_are_near_by_their_characters() -> None:
    rng = random.Random(4)
    text = "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(40))
    assert _kind(text, text[:20] + "\u9fa0" + text[21:]) == "near"
    assert _kind(HAN, "\u5fb7" + HAN[1:]) is None  # the capital of Germany
    thai = "".join(chr(rng.randrange(0xE01, 0xE2F)) for _ in range(60))
    assert _kind(thai, thai[:30] + "\u0e01\u0e02" + thai[32:]) == "near"


def test_a_wording_changed_with_the_same_numbers_is_still_near() -> None:
    overlap: Overlap = find_overlap(_examples(LONG), _examples(LONG.replace("friends", "colleagues")))
    assert overlap.pairs[0].kind == "near"


@pytest.mark.slow
def test_40000_by_10000_rows_take_less_than_half_a_minute() -> None:
    generator = random.Random(1)
    words = [f"word{number}" for number in range(5000)]
    train = _examples(*(" ".join(generator.choices(words, k=45)) for _ in range(40_000)))
    test = [*_examples(*(" ".join(generator.choices(words, k=45)) for _ in range(9_000))), *train[:1000]]
    started = time.perf_counter()
    overlap = find_overlap(train, test)
    assert overlap.exact_test_rows == 1000
    assert time.perf_counter() - started < 30


def test_gsm8k_test_questions_are_not_in_its_training_questions(shared_data_dir: Path) -> None:
    from tasks.core.data.columns import ColumnMapping, examples
    from tasks.core.data.sources import load_rows

    def rows(split: str) -> list[Example]:
        return list(
            examples(load_rows(str(shared_data_dir / "gsm8k"), split=split), ColumnMapping("question"))
        )

    overlap = find_overlap(rows("train"), rows("test"))
    assert (overlap.train_rows, overlap.test_rows, overlap.exact_test_rows) == (7473, 1319, 0)


def test_too_little_disk_space_is_an_error_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"needs about 1000000\.0 GB, but its disk has .* free"):
        check_disk_space(tmp_path / "not" / "there" / "yet", 10**15)


def test_enough_disk_space_is_no_error(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "not" / "there" / "yet", 1)


def test_a_file_where_a_folder_is_needed_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match="runs is a file"):
        check_disk_space(tmp_path / "runs" / "mine", 1)
