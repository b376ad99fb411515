"""Progress of generation: all figures, over all sessions, on one short line."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.answering import progress_text
from tasks.core.config import Config, load_config
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import Session, append_session
from tasks.inferencer import Inferencer
from tasks.ui.progress import shown_progress
from tests.making.warm.children import warm_children  # noqa: F401

EARLY = GenerationProgress(3, 1000, 0, 0.7, 41.2, 1424.0, 2048, 3, 0)
LARGE = GenerationProgress(949_499, 1_000_000, 1234, 123.4, 98_765.4, 43_210.0, 1_048_576, 256, 120)


def test_the_line_tells_rates_time_left_budget_memory_trouble_and_errors() -> None:
    assert progress_text(EARLY) == "3 rows, 0.7/s, 41 tok/s, 23:44 left, 0 OOM, 0 errors, budget 2.0k"
    large = "949k rows, 123/s, 99k tok/s, 12:00:10 left, 120 OOM, 1.2k errors, budget 1.0M"
    assert progress_text(LARGE) == large


@pytest.mark.parametrize("progress", [EARLY, LARGE])
def test_the_terminal_line_has_less_than_100_characters(
    monkeypatch: pytest.MonkeyPatch, progress: GenerationProgress
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tasks.ui.progress.ProgressArtifact.show", lambda *_: None)
    for name, value in {"COLUMNS": "200", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with shown_progress("generation", "run") as show:
        show(progress.rows_done, progress.rows_total, progress_text(progress))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    assert progress_text(progress) in shown
    assert max(map(len, shown.splitlines())) < 100


def asking(folder: Path, model_dir: Path, questions: list[str], **more: Any) -> Config:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"question": question, "answer": "4"}) for question in questions))
    settings = {
        "model": str(model_dir), "testing_data_id": str(path), "max_new_tokens": 4, "temperature": 0,
        "device": "cpu", "run_name": "run", "score_references": False, **more,
    }  # fmt: skip
    overrides = {f"inferencer.{key}": value for key, value in settings.items()}
    places = {f"pipeline.{kind}_dir": str(folder / kind) for kind in ("runs", "models")}
    return load_config(None, {**overrides, **places})


@pytest.mark.usefixtures("own_cache", "warm_children")
@pytest.mark.parametrize("shards", [1, 2])
def test_errors_and_memory_trouble_of_earlier_sessions_are_counted(
    tmp_path: Path, tiny_model_dir: Path, shards: int
) -> None:
    """The second session finds two error rows in the ledger and an out-of-memory event in the first one's record."""
    questions = ["One?", "  ", "Two?", "\t", "Three?"]
    Inferencer(asking(tmp_path, tiny_model_dir, questions)).infer()
    run = RunDir(tmp_path / "runs" / "run")
    lines = run.ledger_path.read_bytes().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["error"] is None)
    run.ledger_path.write_bytes(b"".join(lines[:3]))
    run.manifest_path.unlink()
    event = {"kind": "out_of_memory", "rows": 4, "tokens": 100, "limit_tokens": 50, "message": ""}
    earlier = Session(
        engine="x", started_at="2024-01-01T00:00:00+00:00", seconds=1.0, rows=3, memory_events=(event,)
    )
    append_session(run, earlier)
    seen: list[GenerationProgress] = []
    config = asking(tmp_path, tiny_model_dir, questions, num_shards=shards)
    Inferencer(config, on_progress=seen.append).infer()
    last = seen[-1]
    assert (last.rows_done, last.rows_total, last.error_rows, last.out_of_memory_count) == (5, 5, 2, 1)
    assert last.limit_tokens > 0


def test_without_a_terminal_the_log_tells_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.ui.progress.ProgressArtifact.show", lambda *_: None)
    with caplog.at_level(logging.INFO), shown_progress("generation", "run") as show:
        show(LARGE.rows_done, LARGE.rows_total, progress_text(LARGE))
    assert f"generation: 94 %, {progress_text(LARGE)}" in caplog.text


def test_what_threads_show_belongs_to_the_run_that_gave_the_progress() -> None:
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import ContextVar

    from tasks.ui import progress

    run: ContextVar[str | None] = ContextVar("run", default=None)
    seen: list[str | None] = []

    class Artifact:
        def __init__(self, key: str, description: str) -> None: ...

        def show(self, done: float, total: float, text: str) -> None:
            seen.append(run.get())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "ProgressArtifact", Artifact)
        run.set("judging")
        with progress.shown_progress("judging", "run") as show, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda done: show(done, 100, ""), range(100)))
    assert seen == ["judging"] * 100
