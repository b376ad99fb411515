"""Training at a URL: checkpoints are sent while it trains, and another machine goes on from the newest whole one."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import Config, load_config
from tasks.core.errors import RunKeyMismatchError, RunLockedError, StorageError
from tasks.core.models.trained.model_store import list_models
from tasks.core.storage.lease import lease
from tasks.core.storage.store import Store
from tasks.core.training import checkpoints
from tasks.core.training.remote import sender, trainings
from tasks.core.training.remote.checkpoints import RemoteCheckpoints
from tasks.core.training.remote.sender import CheckpointSender
from tasks.core.training.run import TrainedModel, TrainingProgress
from tasks.finetuner import FineTune
from tests.making.buckets.s3_server import S3Server, s3_server
from tests.making.warm.python import run_python

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
ROOT = Path(__file__).resolve().parents[2]
_places = itertools.count()

# Dies as soon as the bucket has the checkpoint of the second update whole.
DYING = """
import json, os, signal, sys, time
from tasks.core.config import load_config
from tasks.core.storage.store import Store
from tasks.finetuner import FineTune

settings = json.loads(sys.argv[1])

def die(progress):
    if progress.step < 3:
        return
    store = Store(settings["pipeline.models_dir"])
    while not any(name.endswith("checkpoint-2/complete.json") for name in store.there("")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

import tasks.core.training.session as session
from functools import partial
session.TrainingMeter = partial(session.TrainingMeter, interval_seconds=0)
FineTune(load_config(None, settings), on_progress=die).run()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environ.items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield running


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    rows = [{"question": f"How many has {number}?", "answer": f"{number} apples."} for number in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(
    server: S3Server, tiny_model_dir: Path, rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Six updates with three checkpoints, of which two are kept, at a place of its own."""
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "one"))
    monkeypatch.setattr(sender, "_POLL_SECONDS", 0.05)
    return {
        "fine_tuner.base_model_id": str(tiny_model_dir), "fine_tuner.training_data_id": str(rows_path),
        "fine_tuner.run_name": "tuned", "fine_tuner.epochs": 3, "fine_tuner.device_train_batch_size": 4,
        "fine_tuner.grad_accumulation": 2, "fine_tuner.save_steps": 2, "fine_tuner.log_steps": 1,
        "fine_tuner.save_total_limit": 2, "fine_tuner.learning_rate": 1e-2, "fine_tuner.device": "cpu",
        "pipeline.models_dir": f"s3://tuneproof/training-{next(_places)}",
    }  # fmt: skip


def train(settings: dict[str, Any], **changes: Any) -> TrainedModel:
    config: Config = load_config(None, {**settings, **{f"fine_tuner.{k}": v for k, v in changes.items()}})
    return FineTune(config, on_progress=lambda _: None).run()


def digest(model_dir: Path) -> str:
    return hashlib.sha256((model_dir / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir: Path, rows_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that the training of these tests ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shared = {
        "fine_tuner.base_model_id": str(tiny_model_dir), "fine_tuner.training_data_id": str(rows_path),
        "fine_tuner.run_name": "tuned", "fine_tuner.epochs": 3, "fine_tuner.device_train_batch_size": 4,
        "fine_tuner.grad_accumulation": 2, "fine_tuner.save_steps": 2, "fine_tuner.learning_rate": 1e-2,
        "fine_tuner.device": "cpu", "fine_tuner.log_steps": 1, "pipeline.models_dir": str(folder),
    }  # fmt: skip
    return digest(train(shared).model_dir)


def killed(settings: dict[str, Any]) -> None:
    """Train in a process that is killed after its third update, when the bucket has a checkpoint."""
    process = run_python(["-c", DYING, json.dumps(settings)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL, process.stderr


class PowerFailure(BaseException):
    """Ends a training as a loss of the machine does, but for what its threads may still do."""


def cut_off(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the bucket has the first checkpoint."""

    def fail(checkpoints_dir: Path, *_: Any) -> None:
        while not seals(settings):
            time.sleep(0.02)
        raise PowerFailure

    with monkeypatch.context() as broken, pytest.raises(PowerFailure):
        broken.setattr(checkpoints, "rotate", fail)
        train(settings)


def seals(settings: dict[str, Any]) -> list[str]:
    there = Store(settings["pipeline.models_dir"]).there("")
    return sorted(name.split("/")[-2] for name in there if name.endswith("complete.json"))


def test_a_machine_that_is_lost_in_training_is_gone_on_for_by_another_with_equal_weights(
    settings: dict[str, Any],
    undisturbed: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed(settings)
    shutil.rmtree(tmp_path / "one")  # its cache too
    assert seals(settings) == ["checkpoint-2"]
    (entry,) = list_models(Store(settings["pipeline.models_dir"]))
    assert "training is still going on or was interrupted" in str(entry.reason)
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "two"))
    caplog.set_level("INFO")
    trained = train(settings)
    assert "checkpoint-2 (step 2 of 6)" in caplog.text
    assert digest(trained.model_dir) == undisturbed
    (entry,) = list_models(Store(settings["pipeline.models_dir"]))
    assert entry.complete and entry.manifest == trained.manifest
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "three"))
    assert train(settings).reused


def test_an_unnamed_training_is_found_and_gone_on_with_too(
    settings: dict[str, Any], undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {name: value for name, value in settings.items() if name != "fine_tuner.run_name"}
    cut_off(settings, monkeypatch)
    shutil.rmtree(tmp_path / "one")
    names = Store(settings["pipeline.models_dir"]).names()
    first = train(settings)
    assert [first.model_dir.name] == names and digest(first.model_dir) == undisturbed
    second = train(settings)
    assert second.model_dir.name != first.model_dir.name and not second.reused


def test_checkpoints_there_are_rotated_and_the_newest_is_whole(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate = checkpoints.rotate

    def rotate_once_it_is_sent(checkpoints_dir: Path, *args: Any) -> None:
        newest = checkpoints.all_whole(checkpoints_dir)[-1].name
        while newest not in seals(settings):
            time.sleep(0.02)
        rotate(checkpoints_dir, *args)

    monkeypatch.setattr(checkpoints, "rotate", rotate_once_it_is_sent)
    trained = train(settings)
    there = Store(settings["pipeline.models_dir"]).there("")
    assert "checkpoint-6" in seals(settings) and len(seals(settings)) <= 3
    assert {name.split("/")[-1] for name in there if "/checkpoints/" not in name} >= {
        "adapter_model.safetensors", "identity.json", "tuneproof_manifest.json",
    }  # fmt: skip
    here = checkpoints.all_whole(trained.model_dir / "checkpoints")
    assert len(here) == 2


def test_an_outage_of_the_bucket_costs_the_training_nothing_and_is_told(
    settings: dict[str, Any],
    undisturbed: str,
    server: S3Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rotate, is_over = checkpoints.rotate, threading.Event()

    def rotate_in_an_outage(*args: Any) -> None:
        if not is_over.is_set():
            server.control(rate=1.0)
        while "the training goes on" not in caplog.text:
            time.sleep(0.02)
        rotate(*args)

    def end_it_when_the_model_cannot_be_sent() -> None:
        while "tuned could not be sent, it is tried again" not in caplog.text and not is_over.is_set():
            time.sleep(0.05)
        is_over.set()
        server.control(rate=0)

    monkeypatch.setattr(checkpoints, "rotate", rotate_in_an_outage)
    monkeypatch.setattr(sender, "LAST_SECONDS", 0.1)
    monkeypatch.setattr(trainings, "_FIRST_PAUSE_SECONDS", 0.1)
    watcher = threading.Thread(target=end_it_when_the_model_cannot_be_sent)
    watcher.start()
    try:
        trained = train(settings)
    finally:
        is_over.set()
        watcher.join()
    assert digest(trained.model_dir) == undisturbed
    (entry,) = list_models(Store(settings["pipeline.models_dir"]))
    assert entry.complete


def test_a_model_that_could_not_be_sent_is_kept_and_the_same_command_sends_it(
    settings: dict[str, Any], undisturbed: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, settings)

    def break_at_the_end(progress: TrainingProgress) -> None:
        server.control(rate=1.0 if progress.step >= 5 else 0.0)

    monkeypatch.setattr(trainings, "_PATIENCE_SECONDS", 0.0)
    try:
        with pytest.raises(StorageError, match="The model is complete in") as caught:
            FineTune(config, on_progress=break_at_the_end).run()
    finally:
        server.control(rate=0)
    assert "sends it and trains nothing" in str(caught.value.next_step)
    again = train(settings)
    assert again.reused and digest(again.model_dir) == undisturbed
    (entry,) = list_models(Store(settings["pipeline.models_dir"]))
    assert entry.complete


def test_another_training_of_that_name_is_refused_on_every_machine(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings)
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "two"))
    with pytest.raises(RunKeyMismatchError, match="other settings"):
        train(settings, rank=8)


def test_what_a_machine_kept_of_another_training_of_that_name_is_never_gone_on_with(
    settings: dict[str, Any], undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off({**settings, "fine_tuner.learning_rate": 1e-3}, monkeypatch)
    models = Store(settings["pipeline.models_dir"])
    models.remove_files(models.there(""))  # a person clears it away, and another machine trains anew
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "two"))
    cut_off(settings, monkeypatch)
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "one"))
    trained = train(settings)
    assert digest(trained.model_dir) == undisturbed
    assert (models.local / ".tuned.replaced-1" / "checkpoints").is_dir()


def test_a_training_that_another_machine_holds_is_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease(Store(settings["pipeline.models_dir"]), "tuned/lease.json"):
        monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "two"))
        with pytest.raises(RunLockedError, match="is being written by process"):
            train(settings)


# --- single checkpoints


def checkpoint(checkpoints_dir: Path, step: int, size: int = 1000) -> Path:
    directory = checkpoints_dir / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": [], "step": step}))
    (directory / "optimizer.pt").write_bytes(bytes([step]) * size)
    checkpoints.seal(directory, seconds=step)
    return directory


@pytest.fixture
def own(settings: dict[str, Any]) -> RemoteCheckpoints:
    models = Store(settings["pipeline.models_dir"])
    (models.local / "tuned").mkdir(parents=True)
    return RemoteCheckpoints(models, models.local / "tuned")


def test_a_checkpoint_is_whole_there_or_does_not_count(
    own: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        assert own.send(checkpoint(own.here, step))
    own.models.remove("tuned/checkpoints/checkpoint-4/complete.json")  # as if sending it had been cut off
    third = checkpoint(own.here, 6)
    assert own.send(third)
    own.models.write(
        "tuned/checkpoints/checkpoint-6/optimizer.pt", b"\6" * 999 + b"\7"
    )  # a byte is another one
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "two"))
    other = RemoteCheckpoints(own.models, own.models.local / "tuned")
    other.bring_newest()
    assert checkpoints.resume_point(other.here) == other.here / "checkpoint-2"


def test_a_checkpoint_that_is_rotated_away_while_it_is_sent_is_left_out(
    own: RemoteCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, push = checkpoint(own.here, 2), Store.push

    def push_and_lose(store: Store, paths: Any) -> None:
        push(store, paths)
        shutil.rmtree(directory, ignore_errors=True)

    monkeypatch.setattr(Store, "push", push_and_lose)
    assert not own.send(directory)
    assert "tuned/checkpoints/checkpoint-2/complete.json" not in own.models.there("")


def test_rotation_never_removes_the_newest_whole_one(own: RemoteCheckpoints) -> None:
    for step in (2, 4, 6):
        own.send(checkpoint(own.here, step))
    own.rotate("checkpoint-8", keep=1, best=None)  # which is not there
    assert len(own.there()) == 3
    own.rotate("checkpoint-6", keep=1, best="checkpoint-2")
    assert list(own.there()) == ["checkpoint-2", "checkpoint-6"]


def test_checkpoints_that_come_faster_than_they_are_sent_do_not_pile_up(
    own: RemoteCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, slow = [], threading.Event()
    send = RemoteCheckpoints.send

    def slowly(one: RemoteCheckpoints, directory: Path) -> bool:
        sent.append(directory.name)
        slow.wait(10)
        return send(one, directory)

    monkeypatch.setattr(RemoteCheckpoints, "send", slowly)
    sending = CheckpointSender(own, keep=1)
    checkpoint(own.here, 1)
    sending.start()
    while not sent:
        time.sleep(0.01)
    for step in range(2, 9):
        checkpoint(own.here, step)
    slow.set()
    while list(own.there()) != ["checkpoint-8"]:
        time.sleep(0.02)
    sending.end(last_seconds=1)
    assert sent == ["checkpoint-1", "checkpoint-8"]
