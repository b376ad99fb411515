"""Which texts are the same answer: words in one form, with signs, points and symbols kept."""

from __future__ import annotations

import time

import pytest

from tasks.core.data.normalising import compared_units, contains_words, squad_normalised, words
from tasks.core.metrics.gsm8k import gsm8k_match

SAME = [
    ("A", "A"),
    ("1.0", "1"),
    ("(3.14)", "3.14"),
    ("$1,000", "1000"),
    ("caf\xe9", "cafe\u0301"),
    ("Don\u2019t", "Don't"),
    ("\uff21\uff22\uff23", "ABC"),
    ("New\xa0York", "New York"),
    ("\u5317\u4eac\u3002", "\u5317\u4eac"),
    ("The Eiffel Tower.", "eiffel tower"),
    ("Paris", "paris"),
    ("  Paris \n", "Paris"),
    ("\u201cParis\u201d", "Paris"),
    ("<", "<"),
    ("the", "The"),
    ("a b", "b"),
    ("Option A", "option a."),
    (".5", "0.5"),
    ("-.5", "-0.5"),
    ("(-5)", "-5"),
    (".NET", "NET"),
    ("$50", "50"),
    ("\u20ac1.50", "1.5"),
    ("1.50", "1.5"),
    ("007", "7"),
    ("U.S.", "U.S"),
    ("yes!", "Yes"),
    ("\u2014", "-"),
    ("stra\xdfe", "STRASSE"),
    ("'quoted'", "quoted"),
    ("3.14.", "3.14"),
    ("1,000,000", "1000000"),
    ("+5", "5"),
    ("-0", "0"),
    ("*bold*", "bold"),
    ("the end", "end"),
    ("", ""),
]

OTHER = [
    ("", "A"),
    ("The", "A"),
    ("an", "A"),
    ("B", "A"),
    ("", "B"),
    ("314", "3.14"),
    ("1.0", "10"),
    ("5", "-5"),
    ("12", "1/2"),
    ("", "[]"),
    ("Option A", "Option"),
    ("5-3", "53"),
    ("5 - 3", "5 3"),
    ("a<b", "ab"),
    ("C++", "C"),
    ("C#", "C"),
    ("50%", "50"),
    ("don't", "dont"),
    ("\u2026", ""),
    ("x = 5", "x=5"),
    ("\u0130stanbul", "istanbul"),
    ("\u5317\u4eac", "\u5317 \u4eac"),
    ("1,00", "100"),
    ("1e3", "1000"),
    ("?", "!"),
]

CONTAINED = [
    ("He lives in Paris, France.", "Paris"),
    ("x=18", "18"),
    ("18%", "18"),
    ("New York City", "new york"),
    ("\u6211\u5728\u5317\u4eac\u3002", "\u5317\u4eac"),
    ("The answer: 18.", "18"),
    ("$1,000 total", "1000"),
    ("caf\xe9", "caf\xe9"),
    ("(B)", "B"),
    ("3/4", "3"),
]

NOT_CONTAINED = [
    ("-5", "5"),
    ("1.5", "1"),
    ("Yorkshire", "York"),
    ("a", "the"),
    ("", "x"),
    ("180", "18"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_forms_of_one_answer_are_the_same(answer: str, reference: str) -> None:
    assert words(answer) == words(reference)


@pytest.mark.parametrize(("answer", "reference"), OTHER)
def test_other_answers_stay_different(answer: str, reference: str) -> None:
    assert words(answer) != words(reference)


@pytest.mark.parametrize(("answer", "wanted"), CONTAINED)
def test_words_are_found_within_an_answer(answer: str, wanted: str) -> None:
    assert contains_words(answer, wanted) is True


@pytest.mark.parametrize(("answer", "wanted"), NOT_CONTAINED)
def test_parts_of_words_and_numbers_are_not_found(answer: str, wanted: str) -> None:
    assert contains_words(answer, wanted) is False


def test_a_text_without_words_is_contained_in_nothing_and_does_not_become_empty() -> None:
    assert contains_words("x", " ") is None
    assert words("[]") == ["[]"] and words(" ") == []


def test_scripts_without_blanks_are_compared_by_character() -> None:
    assert compared_units("\u6211\u5728 Berlin\u3002") == ["\u6211", "\u5728", "berlin"]


def test_squads_own_rule_drops_all_punctuation() -> None:
    assert squad_normalised("The 3.14, (a) U.S.") == "314 us"


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("so 18. #### 18", 1, 1),
        ("#### 18 and #### 19", 1, 0),
        ("the answer is $1,800.", 0, 0),
        ("the answer is 18", 0, 1),
        ("#### 18.", 1, 1),
        ("####18", 0, 1),
        ("#### -18", 0, 0),
        ("nothing", 0, 0),
    ],
)
def test_the_filters_of_gsm8k_are_the_harness_own(answer: str, strict: int, flexible: int) -> None:
    reference = "He has 9 * 2 = <<9*2=18>>18.\n#### 18"
    assert gsm8k_match(answer, reference, "strict") == strict
    assert gsm8k_match(answer, reference, "flexible") == flexible


@pytest.mark.parametrize("piece", ["a ", ".", "(.5", "1,", "\u5317", "x=1", "'", ".1", "a.b", "-+"])
def test_a_long_answer_takes_a_moment_only(piece: str) -> None:
    started = time.process_time()
    text = piece * (1_000_000 // len(piece.encode()))
    words(text)
    contains_words(text, "x y")
    assert time.process_time() - started < 5
