"""Many nights: challenges of one champion on the same rows are counted, and share the error."""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import GateConfig
from tasks.core.errors import EvaluationError, StorageError
from tasks.core.evaluation.nights import (
    CHALLENGES_NAME,
    COUNT_NAME,
    ChallengeBook,
    Look,
    allowed_p_value,
    challenge_of,
    expected_difference,
    overlap,
    sketch,
)
from tasks.core.evaluation.outlook import outlook
from tasks.core.storage.store import Store


def look(candidate: str, **fields: Any) -> Look:
    """A look at a candidate's answers."""
    return Look(
        **{
            "at": "2026-01-01T00:00:00+00:00",
            "opponent": "champion",
            "opponent_run": "champion-run",
            "candidate": candidate,
            "candidate_run": f"{candidate}-run",
            "row_count": 100,
            "rows": sketch((i, i) for i in range(100)),
            "metric": "exact_match",
            "difference": 0.01,
            "standard_error": 0.03,
            "p_value": 0.7,
            **fields,
        }
    )


def book(root: Path) -> ChallengeBook:
    """An empty book in a directory of models."""
    (root / "models").mkdir(exist_ok=True)
    return ChallengeBook(Store(str(root / "models")))


def test_each_new_candidate_is_one_challenge_and_the_same_answers_stay_the_same_one(tmp_path: Path) -> None:
    kept = book(tmp_path)
    assert [kept.enter(look(name))[0] for name in ("a", "b", "a", "c", "b")] == [1, 2, 1, 3, 2]
    number, looks = kept.enter(look("c"))
    assert (number, [one.candidate for one in looks]) == (3, ["a", "b", "c"])


def test_another_champion_or_other_rows_begin_anew_but_a_part_of_the_rows_does_not(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.enter(look("a"))
    assert kept.enter(look("b", opponent="next champion"))[0] == 1
    assert kept.enter(look("c", rows=sketch((i, i) for i in range(1000, 1100))))[0] == 1
    assert kept.enter(look("d", rows=sketch((i, i) for i in range(60))))[0] == 2
    assert kept.enter(look("e", rows=sketch((i, i) for i in range(5000))))[0] == 4


def test_a_look_that_a_full_disk_took_half_of_is_no_challenge(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.enter(look("a"))
    path = tmp_path / "models" / CHALLENGES_NAME
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            kept.enter(look("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert kept.enter(look("b"))[0] == 2


def test_an_addition_that_was_cut_off_is_no_challenge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = book(tmp_path)
    kept.enter(look("a"))
    path = tmp_path / "models" / CHALLENGES_NAME
    path.write_bytes(path.read_bytes() + b'{"at": "2026')
    assert kept.enter(look("b"))[0] == 2
    assert "12 bytes was cut off" in caplog.text
    assert [kept.enter(look(name))[0] for name in "bc"] == [2, 3]


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# What is done to the bytes and lines of a book of three looks, and what is said of it.
DAMAGES: dict[str, tuple[Callable[[bytes, list[bytes]], bytes | None], str]] = {
    "a bit of the first line": (lambda all, lines: _flip(all, len(lines[0]) // 2), "line 1 is d|before line 2"),
    "a bit of an opponent": (lambda all, lines: _flip(all, all.index(b"champion") + 3), "before line 2"),
    "a bit of the last line": (
        lambda all, lines: _flip(all, all.rindex(b"champion") + 3), "line 3 is not the one"
    ),
    "the end of the first line": (
        lambda all, lines: _flip(all, len(lines[0]) - 1), "line 1 is damaged"
    ),
    "a block": (lambda all, lines: all[:-900] + bytes(512) + all[-388:], "line 3 is damaged|line 2 is damaged"),
    "the last line": (lambda all, lines: b"".join(lines[:2]), r"2 lines, .* 3 challenges \(line 3 is gone"),
    "half of the last line": (lambda all, lines: all[:-200], "line 3 is gone"),
    "the middle line": (lambda all, lines: lines[0] + lines[2], "before line 2 is gone"),
    "the first line": (lambda all, lines: lines[1] + lines[2], "before line 1 is gone"),
    "a line twice": (lambda all, lines: lines[0] + lines[1] * 2 + lines[2], "there twice"),
    "the file": (lambda all, lines: None, "is missing or empty, but there were 3"),
    "all its lines": (lambda all, lines: b"", "is missing or empty, but there were 3"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_book_with_a_line_that_is_damaged_or_gone_is_refused_with_its_line(
    tmp_path: Path, damage: str
) -> None:
    kept, path = book(tmp_path), tmp_path / "models" / CHALLENGES_NAME
    for name in "abc":
        kept.enter(look(name))
    content = path.read_bytes()
    change, says = DAMAGES[damage]
    damaged = change(content, content.splitlines(keepends=True))
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    for ask in (lambda: kept.enter(look("b")), lambda: kept.enter(look("d")), kept.check):
        with pytest.raises(EvaluationError, match=says) as caught:
            ask()
        assert str(path) in caught.value.what and COUNT_NAME in str(caught.value.next_step)
    assert (path.read_bytes() if path.exists() else None) == damaged  # nothing is added to it
    path.write_bytes(content)
    assert [kept.enter(look(name))[0] for name in "bd"] == [2, 4]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"lines": 0, "last_sha256": ""}', b'{"lines": 2, "last_sha256": "0"}']
)
def test_a_damaged_count_is_refused_and_a_missing_one_is_written_again(
    tmp_path: Path, content: bytes
) -> None:
    kept, count_path = book(tmp_path), tmp_path / "models" / COUNT_NAME
    for name in "ab":
        kept.enter(look(name))
    right = count_path.read_bytes()
    count_path.write_bytes(content)
    with pytest.raises(EvaluationError, match=COUNT_NAME):
        kept.enter(look("c"))
    count_path.unlink()
    assert kept.enter(look("b"))[0] == 2
    assert count_path.read_bytes() == right


def test_a_look_whose_count_was_not_written_any_more_is_counted(tmp_path: Path) -> None:
    kept, count_path = book(tmp_path), tmp_path / "models" / COUNT_NAME
    kept.enter(look("a"))
    before = count_path.read_bytes()
    kept.enter(look("b"))
    count_path.write_bytes(before)  # as after a kill between both
    assert [kept.enter(look(name))[0] for name in "bc"] == [2, 3]


def test_a_book_of_an_earlier_version_is_gone_on_with_and_guarded_from_then_on(tmp_path: Path) -> None:
    kept, path = book(tmp_path), tmp_path / "models" / CHALLENGES_NAME
    old = [look(name).model_dump(exclude={"previous"}) for name in "ab"]
    path.write_text("".join(json.dumps(one) + "\n" for one in old))
    assert [kept.enter(look(name))[0] for name in "bc"] == [2, 3]
    path.write_text("".join(json.dumps(one) + "\n" for one in old[:1]))
    with pytest.raises(EvaluationError, match="line 2 is gone"):
        kept.enter(look("d"))


def _enter(root: str, name: str) -> int:
    return book(Path(root)).enter(look(name))[0]


def test_of_many_at_once_each_gets_a_number_of_its_own(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        numbers = pool.starmap(_enter, [(str(tmp_path), f"model-{i}") for i in range(12)])
    assert sorted(numbers) == list(range(1, 13))


def test_the_book_lies_at_the_url_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path / 'bucket' / 'models'}"
    for machine, number in (("one", 1), ("two", 2)):
        monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / machine))
        assert ChallengeBook(Store(url)).enter(look(machine))[0] == number
    assert len((tmp_path / "bucket" / "models" / CHALLENGES_NAME).read_text().splitlines()) == 2


def test_the_error_of_a_line_of_challenges_is_that_of_one_test() -> None:
    first = [allowed_p_value(k, 30, 0.95, "champion") for k in range(1, 31)]
    assert sum(first) / 2 == pytest.approx(0.05), "on the side on which models are promoted"
    assert sum(allowed_p_value(k, 30, 0.95, "champion") for k in range(1, 1000)) / 2 < 0.1
    assert allowed_p_value(31, 30, 0.95, "champion") == pytest.approx(first[0] / 2)
    assert allowed_p_value(1, 1, 0.95, "champion") == pytest.approx(0.05)


def test_the_first_model_against_its_base_is_judged_alone_and_the_next_one_is_not() -> None:
    assert allowed_p_value(1, 30, 0.95, "base") == pytest.approx(0.05)
    assert allowed_p_value(2, 30, 0.95, "base") == pytest.approx(0.1 / 30)


def test_the_gain_to_expect_is_near_the_seen_one_when_it_is_sure_and_small_after_many_looks() -> None:
    sure = look("sure", difference=0.75, standard_error=0.045)
    assert expected_difference(sure, [sure]) == pytest.approx(0.75, abs=0.02)
    lucky = look("lucky", difference=0.09, standard_error=0.03)
    nothing = [look(f"n{i}", difference=0.03 * (-1) ** i, standard_error=0.03) for i in range(29)]
    alone = expected_difference(lucky, [lucky])
    after_many = expected_difference(lucky, [*nothing, lucky])
    assert alone is not None and after_many is not None
    assert 0.04 < alone < 0.07 and 0 < after_many < 0.03
    assert expected_difference(look("x", difference=None), []) is None


def test_looks_by_another_metric_do_not_enter_the_gain_to_expect() -> None:
    one = look("one", difference=0.3, standard_error=0.03)
    other = look("other", metric="f1", difference=0.0, standard_error=0.5)
    assert expected_difference(one, [other, one]) == expected_difference(one, [one])


def test_a_sketch_tells_how_much_of_the_smaller_set_the_larger_one_holds() -> None:
    whole = sketch((i, 0) for i in range(10_000))
    assert overlap(whole, whole) == 1
    assert overlap(whole, sketch((i, 0) for i in range(3_000))) == 1
    half = sketch((i, 0) for i in range(5_000, 15_000))
    assert 0.35 < overlap(whole, half) < 0.65
    assert overlap(whole, sketch((i, 1) for i in range(10_000))) == 0


def test_what_the_gate_is_told_names_the_challenge() -> None:
    mine = look("mine")
    told = challenge_of(mine, 4, [mine], challenges=30, confidence=0.95, against="champion")
    assert (told.number, told.challenges) == (4, 30)
    assert told.allowed_p_value == pytest.approx(0.1 / 30)


def test_a_plan_says_what_its_rows_can_show_and_which_checks_they_cannot_decide() -> None:
    gate = GateConfig(guard_metrics=("json_valid",))
    told = list(outlook(200, gate, ["json_valid"], 0.95, has_champion=False))
    assert told[0].startswith("200 rows show a true gain of 10.9 points over the base in 4 of 5 cases")
    assert "that Json valid does not fall by 3 points needs about 873 rows" in told[1]
    assert "too few here" in told[1]
    against_champion = next(outlook(200, gate, [], 0.95, has_champion=True))
    assert "14.6 points over the champion" in against_champion and "p at most 0.0033" in against_champion
    assert "fewer than gate.minimum_rows = 50" in next(outlook(40, gate, [], 0.95, has_champion=False))
