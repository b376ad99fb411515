"""Generation in a child process survives the child's death."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tasks.core.config import load_config
from tasks.core.errors import DataError, RunKeyMismatchError
from tasks.core.generation.plan import RunPlan
from tasks.core.generation.runners import child, pool
from tasks.core.generation.runners.child import Child
from tasks.core.generation.runners.choosing import choose_runner
from tasks.core.generation.runners.here import Here
from tasks.core.generation.runners.isolation import ChildDiedError, is_isolated, run_in_child
from tasks.core.generation.runners.processes import Processes
from tasks.core.generation.runners.seats import VISIBLE_DEVICES, Seat
from tasks.core.memory.budget import FileBudgetStore, TokenBudget
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.shards import Shard
from tasks.inferencer import Inferencer
from tests.making import isolated_work
from tests.making.model_files import edit_json
from tests.making.warm.children import warm_children  # noqa: F401

ROWS = 14


class Fragile(Inferencer):
    """Has a segmentation fault in a forward pass over more rows than it bears, or over a lethal text."""

    MOST_ROWS = 4
    LETHAL = "never asked"
    rows = 0

    def token_budget(self) -> TokenBudget:
        budget = super().token_budget()
        tell = budget.on_admit

        def admit(rows: int, tokens: int, alone: str | None) -> None:
            self.rows = rows
            if tell is not None:
                tell(rows, tokens, alone)

        budget.on_admit = admit
        self.load_model_and_tokenizer().model.register_forward_pre_hook(self.pass_forward, with_kwargs=True)
        return budget

    def pass_forward(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        text = "".join(self.load_model_and_tokenizer().tokenizer.batch_decode(inputs["input_ids"]))
        if self.rows > self.MOST_ROWS or self.LETHAL in text:
            os.kill(os.getpid(), signal.SIGSEGV)


class NeverBears(Fragile):
    MOST_ROWS = 0


class BearsAllButOne(Fragile):
    MOST_ROWS = ROWS
    LETHAL = "dog 7"


class DiesAfterTheLastRow(Inferencer):
    """Has a segmentation fault when all rows are answered, as some libraries do while they end."""

    def generate_responses(self, prepared: RunPlan) -> LedgerIndex:
        index = super().generate_responses(prepared)
        if not self.generates_in_child:
            os.kill(os.getpid(), signal.SIGSEGV)
        return index


class Murdered(Inferencer):
    """Is ended by somebody's SIGKILL, which is not for lack of memory."""

    def token_budget(self) -> TokenBudget:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


@pytest.fixture
def overrides(tmp_path: Path, tiny_model_dir: Path, own_cache: Path, warm_children: None) -> dict[str, Any]:  # noqa: F811
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"How many has dog {n}?", "answer": str(n)} for n in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "inferencer.model": str(tiny_model_dir), "inferencer.testing_data_id": str(path),
        "inferencer.max_new_tokens": 4, "inferencer.temperature": 0, "inferencer.device": "cpu",
        "inferencer.isolation": "process", "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"), "inferencer.run_name_suffix": "-isolated",
    }  # fmt: skip


def test_a_child_gives_the_answers_that_the_parent_would(overrides: dict[str, Any], tmp_path: Path) -> None:
    progress: list[int] = []
    isolated = Inferencer(
        load_config(None, overrides), on_progress=lambda seen: progress.append(seen.rows_done)
    )
    references: list[tuple[int, int]] = []
    isolated.on_reference_progress = lambda seen: references.append((seen.rows_done, seen.rows_total))
    here = {**overrides, "inferencer.isolation": "none", "pipeline.runs_dir": str(tmp_path / "here")}
    assert [row.predicted_answer for row in isolated.run()] == [
        row.predicted_answer for row in Inferencer(load_config(None, here)).run()
    ]
    assert progress[-1] == ROWS
    assert references[-1] == (ROWS, ROWS)
    manifest = isolated.infer()
    assert manifest.run_name.endswith("-isolated")
    assert not manifest.run_name.endswith("-isolated-isolated")
    assert manifest.reference_perplexity is not None


def test_a_native_crash_shrinks_the_batch_and_the_next_run_begins_with_what_fits(
    overrides: dict[str, Any],
) -> None:
    manifest = Fragile(load_config(None, overrides)).infer()
    assert (manifest.row_count, manifest.error_count) == (ROWS, 0)
    died = [event for event in manifest.memory_events if event.kind == "process_died"]
    assert len(died) > 1
    assert "SIGSEGV" in died[0].message
    assert died[0].limit_tokens < died[0].tokens
    again = Fragile(load_config(None, {**overrides, "inferencer.run_name": "again"})).infer()
    assert (again.row_count, again.memory_events) == (ROWS, ())


def test_a_row_that_kills_the_child_alone_becomes_an_error_row(overrides: dict[str, Any]) -> None:
    inferencer = BearsAllButOne(load_config(None, {**overrides, "inferencer.batch_size": 2}))
    rows = inferencer.run()
    [failed] = [row for row in rows if row.error is not None]
    assert len(rows) == ROWS
    assert failed.question == "How many has dog 7?"
    assert "no answer with this row alone, twice: the process ended with signal SIGSEGV" in str(failed.error)
    [run_path] = Path(overrides["pipeline.runs_dir"]).iterdir()
    scored = [json.loads(line)["id"] for line in RunDir(run_path).references_path.read_text().splitlines()]
    assert sorted(scored) == sorted(row.id for row in rows if row is not failed), "its reference is not tried"
    assert FileBudgetStore().path.exists() is False, "a lethal row says nothing about how much fits"


def test_a_child_that_dies_at_every_row_is_an_error_that_keeps_the_ledger(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.core.generation.runners.deaths.FRUITLESS_DEATHS", 3)
    with pytest.raises(ChildDiedError, match="SIGSEGV"):
        NeverBears(load_config(None, {**overrides, "inferencer.batch_size": 1})).infer()
    [run_path] = Path(overrides["pipeline.runs_dir"]).iterdir()
    [row] = [json.loads(line) for line in RunDir(run_path).ledger_path.read_text().splitlines()]
    assert "no answer with this row alone" in row["error"]


def test_a_child_that_dies_after_the_last_row_has_done_its_work(overrides: dict[str, Any]) -> None:
    unscored = {**overrides, "inferencer.score_references": False}
    manifest = DiesAfterTheLastRow(load_config(None, unscored)).infer()
    assert (manifest.row_count, manifest.error_count) == (ROWS, 0)
    assert (manifest.engine, manifest.device) == ("inflight", "cpu")
    assert manifest.generation_seconds > 0


def test_a_child_killed_by_somebody_is_not_taken_for_out_of_memory(overrides: dict[str, Any]) -> None:
    with pytest.raises(ChildDiedError, match="SIGKILL"):
        Murdered(load_config(None, overrides)).infer()


@pytest.mark.usefixtures("warm_children")
def test_errors_of_the_child_are_raised_in_the_parent_whole() -> None:
    with pytest.raises(DataError) as caught:
        run_in_child(isolated_work.raises, "row 7 is bad", print)
    assert caught.value.what == "row 7 is bad"
    assert caught.value.next_step == "do something else"


@pytest.mark.usefixtures("warm_children")
def test_an_error_that_cannot_be_pickled_arrives_with_its_type_and_message() -> None:
    with pytest.raises(ChildDiedError, match="HTTPStatusError: the Hub is down"):
        run_in_child(isolated_work.raises_what_cannot_be_pickled, "the Hub is down", print)


def test_messages_arrive_in_order_before_the_end() -> None:
    heard: list[int] = []
    assert run_in_child(isolated_work.speaks, 100, heard.append) is None
    assert heard == list(range(100))


def test_a_killed_parent_leaves_no_child_behind(tmp_path: Path) -> None:
    pid_path = tmp_path / "pid"
    parent = multiprocessing.get_context("spawn").Process(
        target=isolated_work.leaves_a_child, args=(None, str(pid_path))
    )
    parent.start()
    child = psutil.Process(wait_for(lambda: pid_path.is_file() and int(pid_path.read_text() or 0)))
    parent.kill()
    parent.join()
    gone, _ = psutil.wait_procs([child], timeout=240)
    assert gone


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition gives as soon as it gives something."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize(
    ("isolation", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("none", "cuda", False), ("process", "cpu", True)],
)
def test_auto_isolates_generation_on_a_gpu_only(
    isolation: Any, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = ["cuda:0", "cpu"]
    monkeypatch.setattr("tasks.core.models.placement.available_devices", lambda: devices)
    assert is_isolated(isolation, device) is expected


@pytest.mark.parametrize(
    ("more", "part", "expected"),
    [
        ({"isolation": "none"}, None, Here),
        ({"isolation": "process"}, None, Child),
        ({"isolation": "none"}, Shard(0, 2), Here),
        ({"isolation": "process"}, Shard(0, 2), Child),
        (
            {"num_shards": 2, "shard_runner": "threads", "isolation": "process"},
            None,
            Here,
        ),  # its shards: children
        ({"num_shards": 2, "shard_runner": "processes"}, None, Processes),
        ({"num_shards": 2, "shard_runner": "dask", "isolation": "none"}, Shard(1, 2), Here),
    ],
)
def test_where_a_plan_is_answered_follows_from_its_settings_and_its_part(
    overrides: dict[str, Any], more: dict[str, Any], part: Shard | None, expected: type
) -> None:
    changed = {f"inferencer.{key}": value for key, value in more.items()}
    inferencer = Inferencer(load_config(None, {**overrides, **changed}))
    plan = inferencer.plan()
    assert isinstance(choose_runner(replace(plan, part=part), inferencer), expected)
    mapped = Here(inferencer)
    is_split = part is None and "num_shards" in more
    assert (choose_runner(replace(plan, part=part), inferencer, mapped=mapped) is mapped) is is_split


def test_a_process_has_taken_its_gpu_before_a_library_may_look_at_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    for module in (child, pool):
        monkeypatch.setattr(module, "import_in_child", lambda: seen.append(os.environ[VISIBLE_DEVICES]))
    monkeypatch.setenv(VISIBLE_DEVICES, "0,1,2,3")
    monkeypatch.setattr(pool, "_end_with_parent", lambda stop: None)
    monkeypatch.setattr(pool, "_seat", None)
    free: queue.Queue[Seat] = queue.Queue()
    free.put(Seat("3"))
    pool.begin(free, threading.Event())  # type: ignore[arg-type]
    work: Any = SimpleNamespace(seat=Seat("1"), take_over=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        child._answer(None, work)  # type: ignore[arg-type]
    assert seen == ["3", "1"]


def test_a_plan_is_the_same_after_its_way_to_another_process(overrides: dict[str, Any]) -> None:
    plan = Fragile(load_config(None, overrides)).plan()
    there = pickle.loads(pickle.dumps(replace(plan, part=Shard(1, 3), seat=Seat("5", 2))))
    assert (there.identity, there.spec, there.config) == (plan.identity, plan.spec, plan.config)
    assert (there.run_name, there.store, there.answerer) == (plan.run_name, plan.store, Fragile)
    assert (there.part, there.seat) == (Shard(1, 3), Seat("5", 2))
    assert list(there.rows.examples()) == list(plan.rows.examples())
    with pytest.raises(FrozenInstanceError):
        there.run_name = "other"


def test_another_process_that_has_other_weights_refuses_the_plan(
    overrides: dict[str, Any], model_copy: Path
) -> None:
    plan = Inferencer(load_config(None, {**overrides, "inferencer.model": str(model_copy)})).plan()
    edit_json(model_copy / "config.json", rms_norm_eps=0.5)
    with pytest.raises(RunKeyMismatchError, match="weights"):
        plan.take_over()


def test_generation_is_isolated_by_default_in_deployments_but_not_elsewhere() -> None:
    from prefect.client.schemas.objects import FlowRun

    from flows.parameters import load_settings
    from tasks.server.telling import root_of_runs

    assert load_settings(load_config()).inferencer.isolation == "auto"
    with root_of_runs(FlowRun(flow_id=uuid.uuid4(), deployment_id=uuid.uuid4())):
        assert load_settings(load_config()).inferencer.isolation == "process"
        off = load_config(None, {"inferencer.isolation": "none"})
        assert load_settings(off).inferencer.isolation == "none"
