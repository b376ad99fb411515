"""Runs and models at URLs: one machine goes on where another stopped, and nothing but the address is needed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import load_config
from tasks.core.errors import RunKeyMismatchError, RunLockedError, StorageError
from tasks.core.evaluation.noise import find_repeat
from tasks.core.evaluation.opponents.remote_runs import bring_overview, bring_run
from tasks.core.models.trained.discovery import find_model
from tasks.core.models.trained.model_store import list_manifests, send_model
from tasks.core.records import Completion, RunIdentity
from tasks.core.runs.ledger import Ledger
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import Session, append_session
from tasks.core.runs.shards import all_shards
from tasks.core.runs.sync import RunSync
from tasks.core.runs.work_done import WorkDone
from tasks.core.storage.lease import lease
from tasks.core.storage.store import Store, local_copy
from tasks.evaluator import Evaluator
from tasks.inferencer import Inferencer
from tests.making.buckets.s3_server import s3_server
from tests.making.model_runs import make_run

ROWS = 12


class Machine:
    """Switches between machines: each has a cache of its own and shares nothing but the URL."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self._root, self._patch = root, patch

    def use(self, name: str) -> None:
        self._patch.setenv("TUNEPROOF_CACHE", str(self._root / name))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    switch = Machine(tmp_path, monkeypatch)
    switch.use("one")
    return switch


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """A URL of a file system that all machines reach."""
    return (tmp_path / "bucket").as_uri()


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """A bucket of a local S3 server."""
    with s3_server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environ.items():
            patch.setenv(name, value)
        yield "s3://tuneproof/team"


@pytest.fixture
def overrides(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"How many legs has dog {n}?", "answer": str(n)} for n in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "inferencer.model": str(tiny_model_dir), "inferencer.testing_data_id": str(path),
        "inferencer.max_new_tokens": 4, "inferencer.temperature": 0, "inferencer.device": "cpu",
        "inferencer.run_name": "run", "inferencer.batch_size": 3, "inferencer.shard_runner": "threads",
        "pipeline.models_dir": str(tmp_path / "models"), "evaluator.metrics": ["exact_match"],
        "evaluator.bootstrap_resamples": 100,
    }  # fmt: skip


def inferencer(overrides: dict[str, Any], runs_url: str, **more: Any) -> Inferencer:
    changed = {f"inferencer.{key}": value for key, value in more.items()}
    return Inferencer(load_config(None, {**overrides, "pipeline.runs_dir": runs_url, **changed}))


class NoModel(Inferencer):
    """Fails where a model would be loaded."""

    def load_model_and_tokenizer(self) -> Any:
        raise AssertionError("no model is needed")


def test_a_run_at_a_url_is_the_run_in_a_folder_and_another_machine_finds_it_finished(
    overrides: dict[str, Any], bucket: str, tmp_path: Path, machine: Machine
) -> None:
    here = inferencer(overrides, str(tmp_path / "runs")).run()
    manifest = inferencer(overrides, bucket).infer()
    machine.use("two")
    other = NoModel(load_config(None, {**overrides, "pipeline.runs_dir": bucket}))
    assert other.infer() == manifest
    assert [row.predicted_answer for row in other.run()] == [row.predicted_answer for row in here]


def test_shards_answered_on_different_machines_are_published_by_a_third(
    overrides: dict[str, Any], bucket: str, tmp_path: Path, machine: Machine
) -> None:
    for name, shard in zip(("one", "two"), all_shards(2), strict=True):
        machine.use(name)
        worker = inferencer(overrides, bucket, num_shards=2)
        worker.answer_shard(worker.process_dataset(worker.load_dataset()), shard)
    machine.use("three")
    publisher = NoModel(
        load_config(None, {**overrides, "pipeline.runs_dir": bucket, "inferencer.num_shards": 2})
    )
    manifest = publisher.infer()
    assert sum(shard.rows for shard in manifest.shards) == ROWS
    assert manifest.reference_perplexity is not None
    expected = inferencer(overrides, str(tmp_path / "runs")).run()
    published = (publisher.runs.local / "run" / manifest.predictions_path).read_text().splitlines()
    assert [json.loads(line)["predicted_answer"] for line in published] == [
        row.predicted_answer for row in expected
    ]


def test_what_a_machine_sent_before_it_died_is_not_generated_again(
    overrides: dict[str, Any], bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerFailure(BaseException):
        pass

    plain_append, written = Ledger.append, 0

    def append(ledger: Ledger, completion: Completion) -> int:
        nonlocal written
        if written == 7:
            raise PowerFailure
        written += 1
        return plain_append(ledger, completion)

    monkeypatch.setattr(Ledger, "append", append)
    with pytest.raises(PowerFailure):
        inferencer(overrides, bucket).infer()
    monkeypatch.setattr(Ledger, "append", plain_append)
    machine.use("two")
    second = inferencer(overrides, bucket)
    assert second.infer().row_count == ROWS
    assert RunDir(second.runs.local / "run").ledger_path.read_bytes().count(b"\n") == ROWS - 7
    machine.use("one")  # and the first machine, back again, has nothing to do
    assert NoModel(load_config(None, {**overrides, "pipeline.runs_dir": bucket})).infer().row_count == ROWS


def line(row_id: str) -> bytes:
    return json.dumps({"id": row_id, "completion_tokens": 1}).encode() + b"\n"


def sync_of(bucket: str) -> RunSync:
    store = Store(bucket)
    run = RunDir(store.local / "run")
    run.path.mkdir(parents=True, exist_ok=True)
    return RunSync(store, run, interval_seconds=0.05)


def test_a_growing_ledger_is_sent_in_pieces_of_whole_lines(bucket: str, machine: Machine) -> None:
    sync = sync_of(bucket)
    with sync.run.ledger_path.open("wb", buffering=0) as ledger:
        ledger.write(line("a") + b'{"id": "torn')
        with sync.sending(sync.run):
            time.sleep(0.3)
            machine.use("two")
            other = sync_of(bucket)
            other.pull()
            [fetched] = other.run.ledger_paths()
            assert fetched.read_bytes() == line("a")
            machine.use("one")
            ledger.truncate(len(line("a")))
            ledger.seek(0, 2)
            ledger.write(line("b"))
    machine.use("two")
    other.pull()
    assert fetched.read_bytes() == line("a") + line("b")


@pytest.mark.parametrize("is_first_machine", [True, False])
def test_answers_at_a_url_whose_identity_is_gone_are_not_taken_for_those_of_another_run(
    overrides: dict[str, Any], bucket: str, machine: Machine, is_first_machine: bool
) -> None:
    machine.use("first")
    inferencer(overrides, bucket, num_shards=2).infer()
    store = Store(bucket)
    for name in ("identity.json", "manifest.json", "inferencer_output.jsonl"):
        store.remove(f"run/{name}")
    if not is_first_machine:
        machine.use("second")
    other = {**overrides, "inferencer.max_new_tokens": 5}
    reason = "made with other settings" if is_first_machine else "identity.json is gone"
    with pytest.raises(RunKeyMismatchError, match=reason):
        inferencer(other, bucket, num_shards=2).infer()
    assert store.read("run/identity.json") is None


def test_the_time_of_a_session_is_sent_while_it_lasts(bucket: str, machine: Machine) -> None:
    sync = sync_of(bucket)
    sync.run.ledger_path.write_bytes(line("a"))
    one = Session(
        engine="x",
        started_at="2026-01-01T00:00:00",
        seconds=7,
        rows=1,
        session_id="1",
        rows_before=0,
        is_over=False,
    )
    with sync.sending(sync.run):
        append_session(sync.run, one)
        sync.push_part(sync.run)
    machine.use("second")
    elsewhere = sync_of(bucket)
    elsewhere.pull()
    work = WorkDone.of(elsewhere.run, dict.fromkeys(elsewhere.run.ledger_paths(), 1))
    assert (work.seconds, work.untimed_rows) == (7, 0)


def test_a_ledger_begun_anew_does_not_overwrite_what_was_sent(bucket: str, machine: Machine) -> None:
    sync = sync_of(bucket)
    for content in (line("a") + line("b"), line("c")):
        sync.run.ledger_path.write_bytes(content)
        sync.push_part(sync.run)
    machine.use("two")
    other = sync_of(bucket)
    other.pull()
    assert sorted(path.read_bytes() for path in other.run.ledger_paths()) == [
        line("a") + line("b"),
        line("c"),
    ]


def test_a_fetch_that_was_interrupted_half_way_is_mended(bucket: str, machine: Machine) -> None:
    sync = sync_of(bucket)
    sync.run.ledger_path.write_bytes(line("a") + line("b"))
    sync.push_part(sync.run)
    machine.use("two")
    other = sync_of(bucket)
    other.pull()
    [fetched] = other.run.ledger_paths()
    fetched.write_bytes(line("a") + b'{"i')
    other.pull()
    assert fetched.read_bytes() == line("a") + line("b")


def test_another_machine_is_refused_while_a_run_is_held_and_let_in_when_its_holder_died(
    overrides: dict[str, Any], bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = inferencer(overrides, bucket)
    prepared = holder.process_dataset(holder.load_dataset())
    with prepared.locked():
        machine.use("two")
        with pytest.raises(RunLockedError, match="wait for it to end"):
            inferencer(overrides, bucket).infer()
        left_behind = Store(bucket).read("run/lease.json")
        machine.use("one")
    assert Store(bucket).read("run/lease.json") is None
    assert left_behind is not None
    outlived = json.loads(left_behind) | {"until": time.time() - 1}
    Store(bucket).write("run/lease.json", json.dumps(outlived).encode())
    machine.use("two")
    assert inferencer(overrides, bucket).infer().row_count == ROWS


def test_a_lease_that_another_machine_took_over_is_left_to_it(bucket: str, machine: Machine) -> None:
    store, name = Store(bucket), "run/lease.json"
    with lease(store, name):
        mine = json.loads(store.read(name) or b"")
        store.write(name, json.dumps(mine | {"machine": "other"}).encode())
    assert json.loads(store.read(name) or b"")["machine"] == "other"


def test_of_two_machines_that_begin_one_run_with_different_settings_one_is_refused(
    overrides: dict[str, Any], bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.use("two")
    second = inferencer(overrides, bucket, max_new_tokens=3)
    dataset, claim = second.load_dataset(), RunSync.claim

    def claim_too_late(sync: RunSync, identity: RunIdentity) -> None:
        """The first machine claims the run after the second one has looked whether anybody did."""
        monkeypatch.setattr(RunSync, "claim", claim)
        machine.use("one")
        first = inferencer(overrides, bucket)
        first.process_dataset(first.load_dataset())
        machine.use("two")
        sync.claim(identity)

    monkeypatch.setattr(RunSync, "claim", claim_too_late)
    with pytest.raises(RunKeyMismatchError, match="max_new_tokens: 4 -> 3"):
        second.process_dataset(dataset)
    machine.use("one")
    assert inferencer(overrides, bucket).infer().row_count == ROWS


def test_a_run_that_another_machine_gave_other_settings_is_not_taken_for_finished(
    overrides: dict[str, Any], bucket: str, machine: Machine
) -> None:
    late = inferencer(overrides, bucket, max_new_tokens=3)
    prepared = late.process_dataset(late.load_dataset())
    Store(bucket).remove("run/identity.json")
    machine.use("two")
    inferencer(overrides, bucket).infer()
    machine.use("one")
    prepared.sync.pull()
    assert late.finished(prepared) is None
    with pytest.raises(RunKeyMismatchError, match="max_new_tokens: 4 -> 3"), prepared.locked():
        pass


def test_rows_answered_twice_are_sent_too_and_found_here_and_on_another_machine(
    overrides: dict[str, Any], bucket: str, machine: Machine
) -> None:
    from tasks.answering import repeat_some_rows

    first = Inferencer(
        load_config(
            None,
            {
                **overrides,
                "pipeline.runs_dir": bucket,
                "inferencer.dtype": "bfloat16",
                "gate.noise_rows": 4,
            },
        )
    )
    prepared = first.process_dataset(first.load_dataset())
    manifest = first.publish(prepared, first.generate_responses(prepared))
    repeat_some_rows.fn(first, prepared, manifest)
    assert find_repeat(prepared.run.path) == prepared.run.path / "repeat-4"
    machine.use("two")
    runs = Store(bucket)
    bring_run(runs, runs.local / "run")
    repeated = find_repeat(runs.local / "run")
    assert repeated is not None and RunDir(repeated).read_manifest().row_count == 4


def test_evaluation_reads_a_run_by_its_url_and_sends_its_results_there(
    overrides: dict[str, Any], s3_bucket: str, machine: Machine
) -> None:
    manifest = inferencer(overrides, f"{s3_bucket}/runs", num_shards=2).infer()
    machine.use("two")
    summary = Evaluator(load_config(None, overrides), run=f"{s3_bucket}/runs/run", baseline="none").run()
    assert summary.candidate.rows == ROWS
    assert summary.candidate.run_key == manifest.run_key
    machine.use("three")
    runs = Store(f"{s3_bucket}/runs")
    assert runs.names() == ["run"]
    assert {"report.html", "scores.jsonl", "evaluator_output_summary.json"} <= set(runs.files_below("run"))
    newest = Evaluator(load_config(None, {**overrides, "pipeline.runs_dir": runs.place}), baseline="none")
    assert newest.find_runs().candidate_path == runs.local / "run"


def test_a_model_at_a_url_answers_and_keeps_its_address_as_its_name(
    overrides: dict[str, Any], s3_bucket: str, tiny_model_dir: Path, tmp_path: Path, machine: Machine
) -> None:
    models = Store(f"{s3_bucket}/models")
    for path in sorted(tiny_model_dir.iterdir()):
        models.write(f"tiny/{path.name}", path.read_bytes())
    expected = inferencer(overrides, str(tmp_path / "runs")).run()
    by_url = inferencer(overrides, str(tmp_path / "other"), model=models.address_of("tiny"))
    answers = by_url.run()
    assert [row.predicted_answer for row in answers] == [row.predicted_answer for row in expected]
    assert answers[0].metadata.model_id == f"{s3_bucket}/models/tiny"
    assert by_url.identify().weights_sha256 == inferencer(overrides, "unused").identify().weights_sha256


def test_the_newest_complete_model_at_a_url_is_found_and_only_that_one_is_brought(
    bucket: str, tiny_model_dir: Path, machine: Machine
) -> None:
    models = Store(bucket)
    for name, day in (("old", 1), ("new", 2)):
        send_model(
            models,
            make_run(models.local, name, base=tiny_model_dir, finished_at=f"2026-01-0{day}T00:00:00+00:00"),
        )
    machine.use("two")
    assert [manifest.run_name for manifest in list_manifests(models)] == ["new", "old"]
    weights = "adapter_model.safetensors"
    assert find_model(model=None, hf_user_id=None, models_dir=models).chosen.source == "newest local"
    assert [path.parent.name for path in models.local.glob(f"*/{weights}")] == ["new"]
    found = find_model(model="old", hf_user_id=None, models_dir=models)
    assert found.chosen.model_id == str(models.local / "old") and (models.local / "old" / weights).is_file()


def test_a_file_is_brought_again_only_when_it_changed_there(bucket: str, machine: Machine) -> None:
    store = Store(bucket)
    store.write("run/a.txt", b"first")
    store.pull("run")
    path = store.local / "run/a.txt"
    before = path.stat().st_mtime_ns
    store.pull("run")
    assert path.stat().st_mtime_ns == before
    store.write("run/a.txt", b"other")
    store.pull("run")
    assert path.read_text() == "other"


def test_an_overview_of_many_runs_takes_one_listing(
    s3_bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    runs, asked = Store(f"{s3_bucket}/overview"), Counter[str]()
    for number in range(20):
        for name in ("manifest.json", "identity.json", "inferencer_output.jsonl", "ledgers/own/a/0-9"):
            runs.write(f"run-{number}/{name}", b"content")
    call = s3fs.S3FileSystem._call_s3

    async def counted(files: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        asked[method] += 1
        return await call(files, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    bring_overview(runs)
    assert {path.name for path in runs.local.glob("run-7/*")} == {"manifest.json", "identity.json"}
    assert len(list(runs.local.glob("*/*.json"))) == asked["get_object"] == 40
    assert asked.total() - asked["get_object"] == 1
    asked.clear()
    bring_overview(runs)
    assert asked.total() == 1 and not asked["get_object"]
    for use in (lambda: runs.write("a", b""), runs.names):
        asked.clear()
        use()
        assert asked.total() == 1


def test_versions_of_fetched_files_are_noted_once_a_pull_and_also_when_it_breaks_off(
    bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    store, noted = Store(bucket), list[Any]()
    for name in "abcd":
        store.write(f"run/{name}", name.encode())
    remember, get_file = Store._remember, LocalFileSystem.get_file

    def noting(store: Store, news: Any) -> None:
        noted.append(news)
        remember(store, news)

    monkeypatch.setattr(Store, "_remember", noting)

    def without_c(files: Any, address: str, *args: Any) -> None:
        if address.endswith("c"):
            raise OSError("the network is gone")
        get_file(files, address, *args)

    monkeypatch.setattr(LocalFileSystem, "get_file", without_c)
    with pytest.raises(StorageError, match="cannot be read: the network is gone"):
        store.pull("run")
    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    store.pull("run")
    assert [sorted(news) for news in noted] == [["run/a", "run/b"], ["run/c", "run/d"]]


def test_two_processes_that_want_the_same_file_at_once_both_get_it_whole(
    bucket: str, machine: Machine
) -> None:
    content = os.urandom(100_000)
    Store(bucket).write("m/model.safetensors", content)
    command = [sys.executable, "-m", "tests.making.slow_fetch", f"{bucket}/m"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(0.2)
    digests = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert digests == [hashlib.sha256(content).hexdigest()] * 2
    assert [path.name for path in (Store(bucket).local / "m").iterdir()] == ["model.safetensors"]


def test_a_large_file_that_another_process_is_bringing_is_waited_for_not_brought_twice(
    bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    Store(bucket).write("m/model.safetensors", b"weights")
    get_file, holds = LocalFileSystem.get_file, Store._holds
    brought, asked, both_want_it = [], set(), threading.Barrier(2)

    def slowly(files: Any, *args: Any) -> None:
        brought.append(args[0])
        time.sleep(0.5)
        get_file(files, *args)

    def after_both_asked(store: Store, *args: Any) -> bool:
        found = holds(store, *args)
        if threading.get_ident() not in asked:
            asked.add(threading.get_ident())
            both_want_it.wait(120)
        return found

    monkeypatch.setattr("tasks.core.storage.store._NOTE_SECONDS", 0.1)
    monkeypatch.setattr(LocalFileSystem, "get_file", slowly)
    monkeypatch.setattr(Store, "_holds", after_both_asked)
    threads = [threading.Thread(target=Store(bucket).pull, args=("m",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(brought) == 1
    assert (Store(bucket).local / "m" / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("url", "told"), [("nonsense://x/y", "not known|nonsense"), ("s4fake://bucket/models/m", "s4fake")]
)
def test_a_url_that_cannot_be_reached_is_an_error_that_says_what_to_check(
    url: str, told: str, machine: Machine
) -> None:
    with pytest.raises(StorageError, match=told):
        local_copy(url)


def test_nothing_at_a_url_is_told(bucket: str, machine: Machine) -> None:
    with pytest.raises(StorageError, match="there is nothing at"):
        local_copy(f"{bucket}/models/none")
