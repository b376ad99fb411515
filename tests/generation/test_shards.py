"""A run in shards gives the file that one process gives, whoever dies and however often the count changes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.config import Config, load_config
from tasks.core.errors import ConfigError, LedgerCorruptError, RunLockedError
from tasks.core.records import RunManifest
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sessions import Session
from tasks.core.runs.shards import Shard, all_shards, shard_numbers
from tasks.core.runs.work_done import seconds_covered
from tasks.inferencer import Inferencer
from tests.making.shard_faults import DiesOnce, Seated, Slow
from tests.making.warm.children import warm_children  # noqa: F401
from tests.making.warm.python import WarmPython

ROWS = 36
BATCH = 4


@pytest.fixture(scope="module")
def questions_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "questions.jsonl"
    rows = [
        {"question": f"How many {'legs ' * (n % 7)}has dog {n}?", "answer": str(n)} for n in range(ROWS - 2)
    ]
    rows += rows[:2]  # equal rows keep an answer each
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings_of(model_dir: Path, questions_path: Path, runs_dir: Path | str) -> dict[str, Any]:
    return {
        "inferencer.model": str(model_dir), "inferencer.testing_data_id": str(questions_path),
        "inferencer.max_new_tokens": 8, "inferencer.temperature": 0.9, "inferencer.device": "cpu",
        "inferencer.run_name": "run", "inferencer.batch_size": BATCH, "inferencer.shard_runner": "threads",
        "inferencer.score_references": False, "pipeline.runs_dir": str(runs_dir),
        "pipeline.models_dir": "models",
    }  # fmt: skip


@pytest.fixture
def overrides(
    tmp_path: Path,
    tiny_model_dir: Path,
    questions_path: Path,
    own_cache: Path,
    warm_children: None,  # noqa: F811
) -> dict[str, Any]:
    return settings_of(tiny_model_dir, questions_path, tmp_path / "runs")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, questions_path: Path
) -> list[dict[str, Any]]:
    """What one process without shards publishes."""
    runs_dir = tmp_path_factory.mktemp("whole")
    Inferencer(config(settings_of(tiny_model_dir, questions_path, runs_dir))).infer()
    return published(RunDir(runs_dir / "run"))


def config(overrides: dict[str, Any], **more: Any) -> Config:
    return load_config(None, {**overrides, **{f"inferencer.{key}": value for key, value in more.items()}})


def run_of(overrides: dict[str, Any]) -> RunDir:
    return RunDir(Path(overrides["pipeline.runs_dir"]) / "run")


def published(run: RunDir) -> list[dict[str, Any]]:
    """The published rows, timings aside."""
    rows = [json.loads(line) for line in run.predictions_path.read_text().splitlines()]
    for row in rows:
        del row["metadata"]["inference_time"], row["metadata"]["batch_size"]
    return rows


def generated(run: RunDir) -> Counter[str]:
    """How often each row was generated, over all ledgers."""
    return Counter(
        json.loads(line)["id"] for path in run.ledger_paths() for line in path.read_text().splitlines()
    )


def test_each_row_is_in_one_shard_by_its_content_and_equal_rows_are_together() -> None:
    ids = np.array([f"{n:016x}-0".encode() for n in range(2000)] + [b"00000000000000ff-1"], dtype="S28")
    numbers = shard_numbers(ids, 5)
    assert numbers[-1] == numbers[0xFF]
    assert np.bincount(numbers, minlength=5).min() > 300
    assert sum(int(shard.mask(ids).sum()) for shard in all_shards(5)) == len(ids)
    assert shard_numbers(ids[::-1], 5).tolist() == numbers[::-1].tolist()  # the order of rows plays no part


@pytest.mark.parametrize("count", [2, 5])
def test_shards_one_after_the_other_give_the_file_that_one_process_gives(
    overrides: dict[str, Any], whole: list[dict[str, Any]], count: int
) -> None:
    seen: list[GenerationProgress] = []
    manifest = Inferencer(config(overrides, num_shards=count), on_progress=seen.append).infer()
    run = run_of(overrides)
    assert published(run) == whole
    assert set(generated(run).values()) == {1}
    assert (seen[-1].rows_done, seen[-1].rows_total) == (ROWS, ROWS)
    assert [shard.shard for shard in manifest.shards] == [shard.name for shard in all_shards(count)]
    assert sum(shard.rows for shard in manifest.shards) == ROWS


def test_references_that_shards_scored_are_joined_to_the_perplexity_of_the_whole(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    one = Inferencer(config({**overrides, "pipeline.runs_dir": str(tmp_path / "one")}, score_references=True))
    joined = Inferencer(config(overrides, score_references=True, num_shards=3)).infer()
    expected = one.infer()
    assert joined.reference_tokens == expected.reference_tokens
    assert joined.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-5)
    lines = run_of(overrides).references_path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in published(run_of(overrides))]


def test_spawned_processes_give_the_same_file_and_a_killed_one_is_begun_again_alone(
    overrides: dict[str, Any], whole: list[dict[str, Any]]
) -> None:
    inferencer = DiesOnce(config(overrides, num_shards=2, shard_runner="processes", shard_processes=2))
    manifest = inferencer.infer()
    run = run_of(overrides)
    assert (run.path.parent / "died").exists()
    assert published(run) == whole
    assert sum((generated(run) - Counter(generated(run).keys())).values()) <= BATCH
    assert manifest.row_count == ROWS


def start_and_kill(overrides: dict[str, Any], after_rows: int) -> int:
    """Infer slowly in another process and kill it after some rows; returns the rows that its ledgers have."""
    with Path(os.devnull).open("r+") as nothing:
        streams = (nothing.fileno(), nothing.fileno(), nothing.fileno())
        arguments = ["-m", "tests.making.shard_faults", json.dumps(overrides)]
        process = WarmPython(arguments, env=os.environ, streams=streams)
    run = run_of(overrides)
    deadline = time.monotonic() + 120
    while generated(run).total() < after_rows and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return generated(run).total()


def test_the_count_may_change_after_a_kill_and_no_finished_row_is_generated_again(
    overrides: dict[str, Any], whole: list[dict[str, Any]]
) -> None:
    kept = start_and_kill({**overrides, "inferencer.num_shards": 3}, after_rows=9)
    run = run_of(overrides)
    assert 0 < kept < ROWS
    assert not run.manifest_path.exists()
    before = generated(run)
    with pytest.raises(LedgerCorruptError, match=f"lack {ROWS - kept} of {ROWS} rows"):
        stopped_early(config(overrides, num_shards=2))
    Inferencer(config(overrides, num_shards=1)).infer()
    assert published(run) == whole
    assert set(generated(run).values()) == {1}
    assert before <= generated(run)


def stopped_early(config: Config) -> RunManifest:
    """Publish without generating."""
    inferencer = Inferencer(config)
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    from tasks.core.generation.answering import index_run

    return inferencer.publish(prepared, index_run(prepared.run, prepared.rows))


def test_a_shard_that_is_being_answered_is_refused_and_the_others_go_on(overrides: dict[str, Any]) -> None:
    inferencer = Inferencer(config(overrides, num_shards=2))
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    with prepared.run.shard(Shard(0, 2)).locked():
        with pytest.raises(RunLockedError, match="0-of-2"):
            inferencer.answer_shard(prepared, Shard(0, 2))
        inferencer.answer_shard(prepared, Shard(1, 2))


def test_a_second_run_in_shards_is_refused_by_the_runs_own_lock(overrides: dict[str, Any]) -> None:
    inferencer = Inferencer(config(overrides, num_shards=2))
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    with prepared.run.locked(), pytest.raises(RunLockedError, match="wait for it to end"):
        inferencer.generate_responses(prepared)


def test_rows_are_published_from_more_ledgers_than_files_may_be_open(
    overrides: dict[str, Any], whole: list[dict[str, Any]]
) -> None:
    """Every row in a ledger of its own, as after many attempts with other counts."""
    inferencer = Inferencer(config(overrides))
    inferencer.infer()
    run = run_of(overrides)
    lines = run.ledger_path.read_bytes().splitlines(keepends=True)
    run.ledger_path.unlink()
    run.predictions_path.unlink()
    for number, line in enumerate(lines * 3):
        part = run.shard(Shard(number, 3 * len(lines)))
        part.path.mkdir(parents=True)
        part.ledger_path.write_bytes(line)
    Inferencer(config(overrides)).infer()
    assert published(run) == whole


def test_a_damaged_line_in_one_shards_ledger_is_named_and_its_row_alone_asked_again(
    overrides: dict[str, Any], whole: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    Inferencer(config(overrides, num_shards=2)).infer()
    run = run_of(overrides)
    run.predictions_path.unlink()
    ledger_path = run.shard(Shard(1, 2)).ledger_path
    content = bytearray(ledger_path.read_bytes())
    content[len(content) // 2] ^= 4
    ledger_path.write_bytes(content)
    manifest = Inferencer(config(overrides, num_shards=2)).infer()
    assert "1-of-2/ledger.jsonl: line" in caplog.text and "is damaged" in caplog.text
    assert published(run) == whole
    assert ledger_path.read_bytes()[len(content) :].count(b"\n") == 1
    assert sum(shard.rows for shard in manifest.shards) == ROWS


def test_times_and_rows_of_killed_sessions_are_in_the_figures(overrides: dict[str, Any]) -> None:
    """A row's batch takes 0.15 s at least; what the killed process did is known to a second or so."""
    slow = {**overrides, "inferencer.batch_size": 1}
    kept = start_and_kill({**slow, "inferencer.num_shards": 2}, after_rows=ROWS // 2)
    manifest = Inferencer(config(slow, num_shards=3)).infer()
    assert manifest.untimed_row_count == 0
    assert manifest.generation_seconds > 0.15 * kept - 1.0
    assert sum(shard.rows for shard in manifest.shards) == ROWS
    assert {shard.shard.partition("-of-")[2] for shard in manifest.shards} == {"2", "3"}


def test_the_speed_of_a_run_that_an_older_version_was_killed_in_is_unknown(overrides: dict[str, Any]) -> None:
    whole_run = Inferencer(config(overrides)).infer()
    assert whole_run.tokens_per_second is not None
    run = run_of(overrides)
    lines = run.ledger_path.read_bytes().splitlines(keepends=True)
    without = [json.loads(line) for line in lines[: ROWS // 2]]
    old = [json.dumps({name: row[name] for name in row if name != "crc32"}) + "\n" for row in without]
    run.ledger_path.write_text("".join(old))
    for path in (run.manifest_path, run.sessions_path):  # that version wrote a session at its end only
        path.unlink()
    manifest = Inferencer(config(overrides)).infer()
    assert run.ledger_path.read_text().startswith("".join(old))
    assert manifest.predictions_sha256 and manifest.row_count == ROWS
    assert (manifest.untimed_row_count, manifest.tokens_per_second) == (ROWS // 2, None)


def test_a_cluster_needs_a_flow_and_an_address_needs_a_cluster(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a Prefect flow"):
        Inferencer(config(overrides, num_shards=2, shard_runner="dask")).infer()
    with pytest.raises(ConfigError, match="shard_address is for a cluster"):
        config(overrides, num_shards=2, shard_address="tcp://127.0.0.1:8786")


def test_time_that_shards_spend_side_by_side_counts_once() -> None:
    def session(started_at: str, seconds: float) -> Session:
        return Session(
            engine="inflight", started_at=f"2026-01-01T00:00:{started_at}+00:00", seconds=seconds, rows=1
        )

    side_by_side = [session("10.000", 5), session("11.500", 2), session("12.000", 6)]
    assert seconds_covered([*side_by_side, session("30", 4)]) == pytest.approx(12)


# --- under Prefect


def infer_in_flow(overrides: dict[str, Any], **more: Any) -> RunManifest:
    from flows.inference import infer

    manifest: RunManifest = infer(config(overrides, **more))
    return manifest


def infer_slowly_in_flow(overrides: dict[str, Any], **more: Any) -> RunManifest:
    """The flow `infer` with an Inferencer that can be met half-way."""
    return infer_in_flow_with(Slow, overrides, **more)


def infer_in_flow_with(
    inferencer_class: type[Inferencer], overrides: dict[str, Any], **more: Any
) -> RunManifest:
    import flows.inference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.inference, "Inferencer", inferencer_class)
        return infer_in_flow(overrides, **more)


def kill_a_worker(cluster: Any, run: RunDir, killed: list[int]) -> None:
    """SIGKILL the process of a Dask worker when shards are half-way; its nanny starts another one."""
    deadline = time.monotonic() + 120
    while generated(run).total() < ROWS // 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    if generated(run).total() < ROWS:
        killed.append(next(iter(cluster.workers.values())).pid)
        os.kill(killed[0], signal.SIGKILL)


def test_mapped_tasks_in_threads_and_in_a_process_pool_give_the_same_file(
    prefect_api: str, overrides: dict[str, Any], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    before = shard_task_runs()
    infer_in_flow(overrides, num_shards=2)
    assert published(run_of(overrides)) == whole
    pooled, began = {**overrides, "pipeline.runs_dir": str(tmp_path / "pooled")}, datetime.now(UTC)
    infer_in_flow(pooled, num_shards=3, shard_runner="processes", shard_processes=2)
    assert published(run_of(pooled)) == whole
    assert set(generated(run_of(pooled)).values()) == {1}
    shards = [shard.name for count in (2, 3) for shard in all_shards(count)]
    assert shard_task_runs() - before == Counter(f"shard {name}" for name in shards)
    wait_until(lambda: models_loaded(began) == 3)  # what shards log is in the run's logs


@pytest.mark.parametrize("runner", ["processes", "dask"])
def test_a_single_shard_is_answered_by_a_process_or_a_local_dask_cluster_too(
    prefect_api: str, overrides: dict[str, Any], whole: list[dict[str, Any]], runner: str
) -> None:
    if runner == "dask":
        pytest.importorskip("distributed")
    began = datetime.now(UTC)
    infer_in_flow(overrides, num_shards=1, shard_runner=runner, shard_processes=2)
    assert published(run_of(overrides)) == whole
    assert set(generated(run_of(overrides)).values()) == {1}
    wait_until(lambda: models_loaded(began) == 1)


def test_a_local_dask_cluster_of_two_workers_gives_the_file_of_one_process_and_each_worker_has_its_gpu(
    prefect_api: str,
    overrides: dict[str, Any],
    whole: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("tasks.core.generation.runners.shards.visible_gpus", lambda device: ("3", "5"))
    began = datetime.now(UTC)
    infer_in_flow_with(Seated, overrides, num_shards=5, shard_runner="dask")
    run = run_of(overrides)
    assert published(run) == whole
    assert set(generated(run).values()) == {1}
    assert sorted(path.name for path in run.path.parent.glob("gpu-*")) == ["gpu-3", "gpu-5"]
    wait_until(lambda: models_loaded(began) == 5)


@pytest.mark.parametrize(
    "more",
    [
        {"shard_runner": "threads"},
        {"shard_runner": "threads", "isolation": "process"},
        {"shard_runner": "processes", "shard_processes": 2},
    ],
    ids=["threads", "threads with a child", "processes"],
)
def test_a_cancelled_run_ends_in_the_middle_of_its_shards_and_keeps_their_rows(
    prefect_api: str, overrides: dict[str, Any], more: dict[str, Any]
) -> None:
    run, over = run_of(overrides), threading.Event()

    def cancel() -> None:
        while not over.wait(0.02):
            if generated(run).total() >= BATCH:
                os.kill(os.getpid(), signal.SIGINT)
                return

    threading.Thread(target=cancel, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            infer_slowly_in_flow({**overrides, "inferencer.batch_size": 1}, num_shards=2, **more)
    finally:
        over.set()
    with run.locked(), contextlib.ExitStack() as shards:
        for path in run.shards_path.glob("*-of-*"):
            shards.enter_context(RunDir(path).locked())  # nobody writes any more
        assert BATCH <= generated(run).total() < ROWS
        assert not run.manifest_path.exists()


def test_a_local_ray_gives_the_file_of_one_process(
    prefect_api: str, overrides: dict[str, Any], whole: list[dict[str, Any]]
) -> None:
    pytest.importorskip("prefect_ray")
    infer_in_flow(overrides, num_shards=2, shard_runner="ray")
    assert published(run_of(overrides)) == whole
    assert set(generated(run_of(overrides)).values()) == {1}


def models_loaded(since: datetime) -> int:
    """How often the logs of runs since then tell that a model was loaded."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        newer = {"logs": {"timestamp": {"after_": since.isoformat()}}}
        found = client._client.post("/logs/filter", json=newer).json()
    return sum(log["message"].startswith("loaded ") for log in found)


def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Logs are sent in batches."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def shard_task_runs() -> Counter[str]:
    """Names of the completed task runs of shards."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        chosen = {"name": {"like_": "-of-"}, "state": {"type": {"any_": ["COMPLETED"]}}}
        found = client._client.post("/task_runs/filter", json={"limit": 200, "task_runs": chosen}).json()
    return Counter(run["name"] for run in found)


def test_a_killed_worker_of_a_local_dask_cluster_costs_one_batch_at_most(
    prefect_api: str, overrides: dict[str, Any], whole: list[dict[str, Any]]
) -> None:
    distributed = pytest.importorskip("distributed")
    run = run_of(overrides)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        killed: list[int] = []
        killer = threading.Thread(target=kill_a_worker, args=(cluster, run, killed))
        killer.start()
        infer_slowly_in_flow(
            overrides, num_shards=4, shard_runner="dask", shard_address=cluster.scheduler_address
        )
        killer.join()
        assert killed
    assert published(run) == whole
    assert sum((generated(run) - Counter(generated(run).keys())).values()) <= BATCH
