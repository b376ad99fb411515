"""GPUs are held by one run at a time, with a server and without one; a dead holder holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.core.files import cache_dir
from tasks.core.locking import HeldElsewhereError, owned_lock
from tasks.server.devices import held_device

HOLD = """
import sys, time
from pathlib import Path
from tasks.core.locking import owned_lock
with owned_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch, own_cache: None) -> None:
    """A machine with GPUs of the UUIDs zero and one, of which CUDA_VISIBLE_DEVICES shows some."""

    def shown() -> list[str]:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")

    def properties(device: str) -> SimpleNamespace:
        physical = shown()[int(device.removeprefix("cuda:"))]
        return SimpleNamespace(uuid={"0": "zero", "1": "one"}[physical])

    def there() -> list[str]:
        return [*(f"cuda:{number}" for number in range(len(shown()))), "cpu"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("tasks.core.models.placement.available_devices", there)
    monkeypatch.setattr("torch.cuda.get_device_properties", properties)


@pytest.fixture
def holder(own_cache: None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the first GPU."""
    command = [sys.executable, "-c", HOLD, str(lock_path("zero"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def lock_path(uuid: str) -> Path:
    return cache_dir() / "devices" / f"GPU-{uuid}.lock"


def is_free(uuid: str) -> bool:
    try:
        with owned_lock(lock_path(uuid)):
            return True
    except HeldElsewhereError:
        return False


def test_a_run_holds_its_gpu_and_lets_go_of_it() -> None:
    with held_device("auto", None):
        assert not is_free("zero")
        assert is_free("one")
    assert is_free("zero")


def test_a_run_that_fails_lets_go_of_its_gpu() -> None:
    with pytest.raises(ZeroDivisionError), held_device("cuda:1", None):
        raise ZeroDivisionError
    assert is_free("one")


def test_a_run_in_shards_holds_all_gpus_that_it_may_use() -> None:
    with held_device("auto", None, all_of_them=True):
        assert not is_free("zero") and not is_free("one")
    with held_device("cuda:1", None, all_of_them=True):
        assert is_free("zero") and not is_free("one")


def test_workers_that_see_one_gpu_each_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with held_device("auto", None):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert is_free("one")
        with held_device("cuda:0", None):
            assert not is_free("zero") and not is_free("one")


def test_gpus_are_taken_in_the_same_order_whatever_order_a_worker_sees_them_in(
    monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    # GPU-one comes before GPU-zero, so who cannot have GPU-zero holds GPU-one, and nobody the other way round.
    def let_go(seconds: float) -> None:
        assert not is_free("one")
        holder.kill()
        holder.wait()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("tasks.server.devices.time.sleep", let_go)
    with caplog.at_level("INFO", logger="tasks.server.devices"), held_device("auto", None, all_of_them=True):
        assert "waiting for cuda:0" in caplog.text


def test_a_part_of_a_divided_gpu_is_held_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-part")
    with held_device("auto", None):
        assert [path.name for path in (cache_dir() / "devices").glob("*.lock")] == ["MIG-part.lock"]


def test_a_cpu_is_not_held() -> None:
    with held_device("cpu", "gpu"):
        assert not (cache_dir() / "devices").exists()


def test_who_waits_is_told_for_whom_and_goes_on_when_the_holder_is_killed(
    holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    monkeypatch.setattr("tasks.server.devices.time.sleep", lambda seconds: asked.set())

    def kill_once_asked() -> None:
        asked.wait()
        holder.kill()

    killer = threading.Thread(target=kill_once_asked)
    killer.start()
    with caplog.at_level("INFO", logger="tasks.server.devices"), held_device("cuda:0", None):
        killer.join()
    assert f"waiting for cuda:0, which is used by process {holder.pid} on" in caplog.text
