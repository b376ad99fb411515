"""A run directory: one owner, however many ask at once, and a record of its sessions that survives a crash."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tasks.core.errors import RunKeyMismatchError, StorageError
from tasks.core.records import Completion, GenerationSettings, ModelIdentity, RunIdentity
from tasks.core.runs.ledger import Ledger
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import (
    Session,
    append_session,
    count_out_of_memory,
    read_sessions,
    recorded,
    settled_sessions,
)
from tasks.core.runs.work_done import WorkDone


def identity(max_new_tokens: int) -> RunIdentity:
    return RunIdentity(
        model=ModelIdentity(
            model_id="tiny",
            weights_sha256="0" * 64,
            dtype="float32",
            chat_template_sha256="1" * 64,
            vocab_size=512,
        ),
        rows_sha256="2" * 64,
        row_count=4,
        generation=GenerationSettings(max_new_tokens=max_new_tokens),
        max_sequence_length=256,
        long_prompts="truncate_left",
    )


def session(rows: int, **more: Any) -> Session:
    fields = {"started_at": "2024-01-01T00:00:00+00:00", "seconds": 1.0, **more}
    return Session(engine="inflight", rows=rows, **fields)


def answered(part: RunDir, *names: str, run_key: str = "") -> None:
    part.path.mkdir(parents=True, exist_ok=True)
    with Ledger(part.ledger_path, run_key) as ledger:
        for name in names:
            ledger.append(Completion(name, "an answer", "stop", 3, 2, 0.5, 4))


def claim_at_once(run: RunDir, claims: list[RunIdentity]) -> list[RunIdentity]:
    """Let each claim in a thread of its own, all at the same moment; returns those that were not refused."""
    barrier = Barrier(len(claims))

    def claim(one: RunIdentity) -> bool:
        barrier.wait()
        try:
            run.claim(one)
        except RunKeyMismatchError:
            return False
        return True

    with ThreadPoolExecutor(len(claims)) as pool:
        return [one for one, taken in zip(claims, pool.map(claim, claims), strict=True) if taken]


def owner(run: RunDir) -> RunIdentity:
    return RunIdentity.model_validate_json(run.identity_path.read_bytes())


def test_of_several_settings_that_claim_a_folder_at_once_one_wins(tmp_path: Path) -> None:
    for attempt in range(10):
        run = RunDir(tmp_path / f"run-{attempt}")
        [winner] = claim_at_once(run, [identity(tokens) for tokens in range(1, 9)])
        assert owner(run) == winner
        assert [path.name for path in run.path.iterdir()] == ["identity.json"]


def test_equal_settings_may_claim_a_folder_at_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert len(claim_at_once(run, [identity(8)] * 4)) == 4


def test_a_folder_is_claimed_once_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    run = RunDir(tmp_path / "run")
    run.claim(identity(8))
    run.claim(identity(8))
    with pytest.raises(RunKeyMismatchError, match="max_new_tokens: 8 -> 9"):
        run.claim(identity(9))


def test_a_session_after_a_torn_line_is_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_session(run, session(1))
    append_session(run, session(2))
    os.truncate(run.sessions_path, run.sessions_path.stat().st_size - 20)
    append_session(run, session(3))
    append_session(run, session(4))
    assert [kept.rows for kept in read_sessions(run)] == [1, 3, 4]


@pytest.mark.parametrize("place", [".", "shards/1-of-3", "fetched/0-of-2.5f0c"])
def test_answers_whose_identity_is_gone_are_nobodys(tmp_path: Path, place: str) -> None:
    run = RunDir(tmp_path / "run")
    run.claim(identity(8))
    answered(RunDir(run.path / place), "a")
    run.identity_path.unlink()
    for tokens in (8, 9):  # whose they were cannot be told
        with pytest.raises(RunKeyMismatchError, match=r"identity.json is gone") as caught:
            run.claim(identity(tokens))
        assert "put identity.json back" in str(caught.value.next_step)
    assert not run.identity_path.exists()


def test_a_folder_whose_ledgers_are_empty_may_be_claimed_anew(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    answered(run)
    run.claim(identity(9))
    assert owner(run) == identity(9)


@pytest.mark.parametrize(
    "damage", ["link", "link to a file that is not there", "deep link", "link of the folder"]
)
def test_a_link_that_leads_out_of_a_run_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    outside, run = tmp_path / "outside", RunDir(tmp_path / "runs" / "run")
    outside.mkdir()
    links = {
        "link": (run.ledger_path, outside),
        "link to a file that is not there": (run.sessions_path, outside / "new"),
        "deep link": (run.shards_path / "0-of-2" / "ledger.jsonl", Path("../../../../outside/ledger.jsonl")),
        "link of the folder": (run.path, outside),
    }
    link, target = links[damage]
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    writes: tuple[Callable[[], object], ...] = (lambda: run.claim(identity(8)), run.locked().__enter__)
    for write in writes:
        with pytest.raises(StorageError, match=f"{link} is a symbolic link that leads out of"):
            write()
    assert list(outside.iterdir()) == []


def test_links_above_a_run_and_within_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "other").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "runs" / "run").symlink_to("other")
    run = RunDir(tmp_path / "runs" / "run")
    run.claim(identity(8))
    (run.path / "newest.json").symlink_to("identity.json")
    with run.locked():
        run.claim(identity(8))


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    dead, alive = 2**22 + 5, os.getppid()
    names = [
        f".manifest.json.{dead}-00c0ffee.tmp",
        f".report.html.{alive}-00c0ffee.tmp",
        "notes.tmp",
        "prompts.bin",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
    with run.locked():
        assert {path.name for path in tmp_path.iterdir()} >= set(names[1:3])
        assert not any((tmp_path / name).exists() for name in (names[0], names[3]))


def test_a_session_that_is_killed_is_told_of_with_its_time_and_all_its_rows(tmp_path: Path) -> None:
    run, began = RunDir(tmp_path), time.monotonic()

    def describe() -> Session:
        return session(1, seconds=time.monotonic() - began, rows_before=0)

    with pytest.raises(KeyboardInterrupt), recorded(run, describe):
        answered(run, "a", "b", "c")
        while read_sessions(run)[0].seconds <= 0.2:
            assert time.monotonic() - began < 60, "its time is not written down"
            time.sleep(0.02)
        content, lasted = run.sessions_path.read_bytes(), time.monotonic() - began
        raise KeyboardInterrupt
    [ended] = read_sessions(run)
    assert ended.is_over
    run.sessions_path.write_bytes(content)  # as kill -9 leaves it
    [killed] = settled_sessions(run)
    assert not killed.is_over
    assert 0.2 < killed.seconds <= lasted
    assert killed.rows == 3
    answered(run, "d")
    append_session(run, session(1, rows_before=3, session_id="next"))
    assert [one.rows for one in settled_sessions(run)] == [3, 1]


def test_rows_of_which_no_session_tells_have_no_known_time(tmp_path: Path) -> None:
    """As versions without heartbeats leave them after a kill."""
    run = RunDir(tmp_path)
    answered(run, "a", "b", "c", "d")
    append_session(run, session(1, rows_before=3))
    work = WorkDone.of(run, {run.ledger_path: 4})
    assert (work.untimed_rows, work.seconds) == (3, 1.0)


def test_shards_give_all_rows_whatever_happened_to_their_sessions(tmp_path: Path) -> None:
    run, first, second = (
        RunDir(tmp_path),
        RunDir(tmp_path / "shards/0-of-2"),
        RunDir(tmp_path / "shards/1-of-3"),
    )
    answered(run, "a")
    answered(first, "b", "c")
    answered(second, "d")
    append_session(first, session(2, shard="0-of-2", rows_before=0))
    rows = {run.ledger_path: 1, first.ledger_path: 2, second.ledger_path: 1}
    shards = {shard.shard: shard.rows for shard in WorkDone.of(run, rows).shards()}
    assert shards == {"0-of-2": 2, "1-of-3": 1, "run": 1}


def test_a_clock_that_goes_back_makes_no_run_faster(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    answered(run, "a", "b")
    for number in range(2):  # both say that they began at the same moment
        append_session(run, session(1, seconds=10.0, rows_before=number))
    assert WorkDone.of(run, {run.ledger_path: 2}).seconds == 20.0


WRONG = (
    {"started_at": "yesterday"}, {"seconds": 1e300}, {"seconds": -1}, {"rows": "many"}, {"shard": "x-of-y"},
    {"memory_events": [5]}, {"unknown": 1},
)  # fmt: skip
RIGHT = {"engine": "x", "started_at": "2024-01-01T00:00:00", "seconds": 1, "rows": 1}


@pytest.mark.parametrize(
    "line", ["null", "[]", "7", "{", "\0\0", *(json.dumps({**RIGHT, **wrong}) for wrong in WRONG)]
)
def test_a_line_that_is_no_session_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    run = RunDir(tmp_path)
    append_session(run, session(1))
    with run.sessions_path.open("a") as file:
        file.write(f"{line}\n")
    append_session(run, session(2, started_at="2023-01-01T00:00:00", memory_events=({"no": "kind"},)))
    assert [kept.rows for kept in WorkDone.of(run, {}).sessions] == [2, 1]
    assert count_out_of_memory([run]) == 0
    assert "sessions.jsonl: line 2 is damaged" in caplog.text
