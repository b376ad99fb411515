"""A run directory: one owner, however many ask at once, and a record of its sessions that survives a crash."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tasks.core.errors import RunKeyMismatchError
from tasks.core.generation.run_dir import RunDir
from tasks.core.generation.sessions import Session, append_session, read_sessions
from tasks.core.records import GenerationSettings, ModelIdentity, RunIdentity


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


def session(rows: int) -> Session:
    return Session(engine="inflight", started_at="2024-01-01T00:00:00+00:00", seconds=1.0, rows=rows)


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
