"""A training that several processes share: the same losses and weights, whatever becomes of one of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tasks.core.config import FineTunerConfig
from tasks.core.errors import StorageError, TrainingError
from tasks.core.models.trained import registry
from tasks.core.training import checkpoints
from tasks.core.training.identity import IDENTITY_NAME
from tasks.core.training.processes import choosing
from tasks.core.training.processes.work import TrainingWork
from tasks.core.training.run import TrainedModel, train
from tests.making.warm.children import warm_children  # noqa: F401
from tests.making.warm.python import run_python
from tests.training.training_faults import planted

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("warm_children")


def write_rows(path: Path, count: int, *, first: int = 0) -> Path:
    """Questions of quite different lengths with short answers."""
    rows = [
        {"question": f"Anna has {i} apples" + " and some books" * (i % 7) + ".", "answer": f"She has {i + 1} apples."}
        for i in range(first, first + count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def settings(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Updates of six rows in pieces of two; 23 rows, so that the last update of an epoch has five."""
    data_dir = tmp_path_factory.mktemp("rows")
    return {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(write_rows(data_dir / "train.jsonl", 23)),
        "validation_data_id": str(write_rows(data_dir / "validation.jsonl", 7, first=100)),
        "epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "device_train_batch_size": 2,
        "device_validation_batch_size": 2,
        "grad_accumulation": 3,
        "lora_dropout": 0.0,
        "save_steps": 3,
        "log_steps": 1,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """What one process learns. Do not write to it."""
    return run(settings, tmp_path_factory.mktemp("alone"))


def run(settings: dict[str, Any], models_dir: Path, name: str = "run", **changes: Any) -> TrainedModel:
    return train(FineTunerConfig(**{**settings, **changes}), models_dir=models_dir, run_name=name)


def difference(one: TrainedModel, other: TrainedModel) -> float:
    """The largest difference between losses, and between weights, of two trainings."""
    losses = [
        [(point.step, point.loss, point.validation_loss) for point in trained.manifest.losses]
        for trained in (one, other)
    ]
    assert [(step, loss is None) for step, loss, _ in losses[0]] == [
        (s, loss is None) for s, loss, _ in losses[1]
    ]
    found: list[float] = [
        abs(mine - theirs)
        for a, b in zip(*losses, strict=True)
        for mine, theirs in zip(a[1:], b[1:], strict=True)
        if mine is not None and theirs is not None
    ]
    (name,) = {path.name for path in one.model_dir.glob("*.safetensors")}
    mine, theirs = (load_file(trained.model_dir / name) for trained in (one, other))
    assert mine.keys() == theirs.keys()
    found += [float((mine[key].float() - theirs[key].float()).abs().max()) for key in mine]
    return max(found)


def bounded(patch: pytest.MonkeyPatch, **bounds: float) -> None:
    """Let the works that are handed out have other bounds."""

    def work_of(*arguments: Any) -> TrainingWork:
        return replace(real(*arguments), **bounds)  # type: ignore[arg-type]

    real = choosing.work_of
    patch.setattr(choosing, "work_of", work_of)


def stopped_group(settings: dict[str, Any], models_dir: Path, processes: int = 2, **changes: Any) -> None:
    """Train in several processes, one of which is killed in the fifth update; nobody begins them again."""
    with pytest.MonkeyPatch.context() as patch:
        planted(patch, "optimizer", "kill", call=5)
        bounded(patch, most_restarts=0)
        with pytest.raises(TrainingError, match="of the training ended with"):
            run(settings, models_dir, processes=processes, **changes)


def cut_off(trained: TrainedModel, models_dir: Path) -> str:
    """Copy a training as if it had been killed before its last checkpoint; give the name of the one before."""
    run_dir = Path(shutil.copytree(trained.model_dir, models_dir / "run"))
    for path in run_dir.iterdir():
        if path.is_file() and path.name != IDENTITY_NAME:
            path.unlink()
    *_, newest, last = checkpoints.all_whole(run_dir / "checkpoints")
    shutil.rmtree(last)
    return newest.name


def test_four_learn_what_one_process_learns_and_two_or_one_go_on_where_they_have_ended(
    settings: dict[str, Any], alone: TrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (alone.manifest.processes, alone.manifest.strategy) == (1, "one")
    stopped_group(settings, tmp_path, processes=4)
    kept_dir = shutil.copytree(tmp_path, tmp_path / "kept")
    caplog.set_level("INFO")
    shared = run(settings, tmp_path, processes=2)
    assert (shared.manifest.processes, shared.manifest.strategy) == (2, "ddp")
    assert difference(alone, shared) < 1e-5
    assert shared.manifest.trained_tokens == alone.manifest.trained_tokens
    assert not list((tmp_path / "run" / "checkpoints").glob(".group-*"))
    assert difference(alone, run(settings, kept_dir)) < 1e-5
    assert caplog.text.count("checkpoint-4 (step 4 of 8)") == 2


def test_two_processes_go_on_where_one_has_ended(
    settings: dict[str, Any], alone: TrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = cut_off(alone, tmp_path)
    caplog.set_level("INFO")
    shared = run(settings, tmp_path, processes=2)
    assert (shared.manifest.processes, shared.manifest.strategy) == (2, "ddp")
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / name} " in caplog.text
    assert difference(alone, shared) < 1e-5


def test_a_model_that_is_shared_out_is_published_whole_and_its_checkpoints_and_those_of_one_process_fit_both(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"full_finetuning": True, "packing": True, "max_sequence_length": 128}
    changes["device_train_batch_size"] = 1
    whole = run(settings, tmp_path / "whole", **changes)
    stopped_group(settings, tmp_path, **changes, strategy="fsdp")
    newest = checkpoints.newest_whole(tmp_path / "run" / "checkpoints")
    assert newest is not None
    sizes = [part.stat().st_size for part in newest.glob("*.distcp")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    kept_dir = shutil.copytree(tmp_path, tmp_path / "kept")
    shared = run(settings, tmp_path, **changes, processes=2, strategy="fsdp")
    assert (shared.manifest.processes, shared.manifest.strategy) == (2, "fsdp")
    assert difference(whole, shared) < 1e-5
    assert difference(whole, run(settings, kept_dir, **changes)) < 1e-5
    name = cut_off(whole, tmp_path / "cut off")
    caplog.set_level("INFO")
    shared = run(settings, tmp_path / "cut off", **changes, processes=2, strategy="fsdp")
    assert (shared.manifest.processes, shared.manifest.strategy) == (2, "fsdp")
    assert f"going on from {tmp_path / 'cut off' / 'run' / 'checkpoints' / name} " in caplog.text
    assert difference(whole, shared) < 1e-5


def test_a_group_one_of_which_is_killed_begins_again_at_the_newest_checkpoint(
    settings: dict[str, Any], alone: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, "gradients", "kill", rank=0, call=5)
    seen: list[int] = []
    config = FineTunerConfig(**settings, processes=2)
    trained = train(
        config, models_dir=tmp_path, run_name="run", on_progress=lambda progress: seen.append(progress.step)
    )
    (restart,) = trained.manifest.restarts
    assert (restart.cause, restart.rank, restart.step) == ("signal SIGKILL", 0, 4)
    assert difference(alone, trained) < 1e-5
    assert seen[-1] == trained.manifest.steps == 8


def test_memory_that_runs_out_in_one_process_makes_all_compute_fewer_rows_at_once(
    settings: dict[str, Any], alone: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, "forward", "memory", rank=1, call=15, tries=9)
    trained = run(settings, tmp_path, processes=2)
    (event,) = trained.manifest.memory_events
    assert (event.kind, event.rows, event.limit_rows) == ("out_of_memory", 2, 1)
    assert "process 1 of 2" in event.message
    assert trained.manifest.settings["rows_at_once"] == 1 and trained.manifest.restarts == ()
    assert difference(alone, trained) < 1e-5


def test_an_error_of_one_process_is_raised_as_it_is_and_nothing_is_begun_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, "seal", "error", rank=0, tries=9)
    with pytest.raises(StorageError, match="the disk of the test is full"):
        run(settings, tmp_path, processes=2)
    assert not multiprocessing.active_children()


KILLED_PARENT = """
import json, os, signal, sys
from pathlib import Path
import psutil
from tasks.core.config import FineTunerConfig
from tasks.core.training.run import train

def die(progress):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    settings, models_dir = json.loads(sys.argv[1])
    train(FineTunerConfig(**settings), models_dir=Path(models_dir), run_name="run", on_progress=die)
"""


def test_no_process_of_a_group_is_left_when_its_parent_is_killed(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    script_path = tmp_path / "killed.py"
    script_path.write_text(KILLED_PARENT)
    arguments = json.dumps([{**settings, "processes": 2, "epochs": 200}, str(tmp_path)])
    done = run_python([str(script_path), arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 2
    deadline = time.monotonic() + 15
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.server
def test_under_torchrun_the_first_process_leads_and_the_others_join(
    settings: dict[str, Any], alone: TrainedModel, tmp_path: Path, prefect_api: str
) -> None:
    given = [f"--fine_tuner.{name}={value}" for name, value in settings.items()]
    command = [
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *(
            "-m",
            "flows.cli",
            "finetune",
            *given,
            f"--pipeline.models_dir={tmp_path}",
            "--fine_tuner.run_name=run",
        ),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": prefect_api}
    done = run_python(command, cwd=tmp_path, env=environment, warm_children=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1
    manifest = registry.read_manifest(tmp_path / "run")
    assert (manifest.processes, manifest.strategy) == (2, "ddp")
    assert difference(alone, TrainedModel(tmp_path / "run", manifest)) < 1e-5
