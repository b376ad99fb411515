"""The commands: one that has nothing to do needs no Prefect run."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import commands
from flows.cli.commands.infer import finished_before
from flows.cli.starting import flow, loads_models
from flows.parameters import load_settings
from flows.server import serve_temporarily, temporary_server
from tasks.core.config import Config, load_config
from tasks.core.errors import NoAnswerError, RunKeyMismatchError
from tasks.inferencer import Inferencer


@pytest.fixture
def overrides(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run of two rows, in a folder of its own, on a machine that names no Prefect server."""
    rows = [{"question": f"How many legs have {n} dogs?", "answer": str(4 * n)} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(temporary_server, "is_server_named", lambda: False)
    monkeypatch.chdir(tmp_path)
    return {
        "inferencer.model": str(tiny_model_dir),
        "inferencer.testing_data_id": "rows.jsonl",
        "inferencer.run_name": "run",
        "inferencer.max_sequence_length": 128,
        "inferencer.max_new_tokens": 4,
        "inferencer.temperature": 0,
        "inferencer.isolation": "none",
    }


def config_of(overrides: dict[str, Any], **more: Any) -> Config:
    return load_config(overrides={**overrides, **more}, environ={})


def test_a_finished_run_is_told_without_a_prefect_run(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Inferencer(config_of(overrides)).infer()
    published = Path("runs/run/inferencer_output.jsonl").read_bytes()

    def start() -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(temporary_server, "TemporaryServer", start)
    tokens = [f"--{key}={value}" for key, value in overrides.items()]
    assert commands.run(["infer", *tokens]) == 0
    told = capsys.readouterr()
    assert told.out == "answers: runs/run/inferencer_output.jsonl (2 rows)\n"
    assert "runs/run is complete (2 rows): nothing to generate" in told.err
    assert Path("runs/run/inferencer_output.jsonl").read_bytes() == published


def test_a_finished_run_is_told_to_a_server_that_is_named(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Inferencer(config_of(overrides)).infer()
    monkeypatch.setattr(temporary_server, "is_server_named", lambda: True)
    assert finished_before(config_of(overrides)) is None


def test_what_is_not_finished_is_left_to_the_flow(overrides: dict[str, Any]) -> None:
    assert finished_before(config_of(overrides)) is None
    assert not Path("runs").exists()
    Inferencer(config_of(overrides, **{"inferencer.score_references": False})).infer()
    assert finished_before(config_of(overrides, **{"inferencer.score_references": False})) is not None
    assert finished_before(config_of(overrides, **{"inferencer.score_references": True})) is None
    path = Path("runs/run/inferencer_output.jsonl")
    path.write_bytes(path.read_bytes().replace(b"dogs", b"cats"))
    assert finished_before(config_of(overrides, **{"inferencer.score_references": False})) is None


def test_a_finished_run_that_lacks_the_repeated_rows_is_left_to_the_flow(overrides: dict[str, Any]) -> None:
    sampled = {"inferencer.temperature": 0.7, "inferencer.dtype": "bfloat16"}
    Inferencer(config_of(overrides, **sampled)).infer()
    assert finished_before(config_of(overrides, **sampled, **{"gate.noise_rows": 0})) is not None
    assert finished_before(config_of(overrides, **sampled, **{"gate.noise_rows": 2})) is None


def test_a_finished_run_of_other_answers_is_refused_as_the_flow_does(overrides: dict[str, Any]) -> None:
    Inferencer(config_of(overrides)).infer()
    with pytest.raises(RunKeyMismatchError, match="max_new_tokens: 4 -> 5"):
        finished_before(config_of(overrides, **{"inferencer.max_new_tokens": 5}))


def test_a_finished_run_without_an_answer_is_refused_as_the_flow_does(overrides: dict[str, Any]) -> None:
    Path("rows.jsonl").write_text('{"question": "", "answer": "4"}\n')
    Inferencer(config_of(overrides)).infer()
    with pytest.raises(NoAnswerError, match="all 1 rows of run"):
        finished_before(config_of(overrides))


@pytest.mark.parametrize(("named", "allowed"), [(True, True), (False, False)])
def test_a_temporary_server_that_the_settings_do_not_want_is_ended_before_anything_uses_it(
    named: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    class Begun:
        api_url = "http://127.0.0.1:9/api"

        def stop(self) -> None:
            ended.append(True)

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(temporary_server, "TemporaryServer", Begun)
    monkeypatch.setattr(temporary_server, "is_server_named", lambda: named)
    monkeypatch.setattr(temporary_server, "_may_be_started", lambda: allowed)
    assert temporary_server.server_for_flows() is None
    assert ended == [True]
    assert "PREFECT_API_URL" not in os.environ


@pytest.fixture
def thawed() -> Iterator[None]:
    """What a command froze is collected again after the test."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("with_server", [True, False])
def test_a_command_freezes_what_it_loaded_only_where_the_process_is_its_own(
    with_server: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []

    class Begun:
        def wait(self) -> None:
            waited.append(gc.isenabled())

    frozen = gc.get_freeze_count()
    monkeypatch.setattr(temporary_server, "server_for_flows", lambda: Begun() if with_server else None)
    assert flow("flows.parameters", "load_settings") is load_settings
    assert waited == [True] * with_server and gc.isenabled()
    assert (gc.get_freeze_count() > frozen) is with_server


@pytest.mark.usefixtures("thawed")
def test_a_temporary_server_collects_garbage_as_soon_as_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    seen: list[bool] = []

    async def startup(_self: uvicorn.Server, _sockets: object = None) -> None:
        seen.append(gc.isenabled())

    def run(self: uvicorn.Server, _sockets: object = None, **_: object) -> None:
        asyncio.run(self.startup())
        seen.append(gc.isenabled())

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(serve_temporarily, "_end_with_command", lambda _: None)
    with socket.socket() as listener:
        serve_temporarily.serve(os.getpid(), listener)
    assert seen == [False, True]


def test_model_libraries_are_loaded_early_where_a_phase_trains_or_answers() -> None:
    only_evaluation = {"pipeline.enable_finetuning": False, "pipeline.enable_inference": False}
    assert not loads_models(load_config(overrides=only_evaluation, environ={}))
    assert loads_models(load_config(overrides={"pipeline.enable_finetuning": False}, environ={}))
