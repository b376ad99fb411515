"""GPUs are held by one run at a time, with a server and without one; a dead holder holds nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.core.files import cache_dir
from tasks.core.locking import HeldElsewhereError, owned_lock
from tasks.devices import held_device

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
    there = ["cuda:0", "cuda:1", "cpu"]
    monkeypatch.setattr("tasks.core.models.placement.available_devices", lambda: there)


@pytest.fixture
def holder(own_cache: None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the first GPU."""
    command = [sys.executable, "-c", HOLD, str(lock_path("cuda-0"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def lock_path(device: str) -> Path:
    return cache_dir() / "devices" / f"{device}.lock"


def is_free(device: str) -> bool:
    try:
        with owned_lock(lock_path(device)):
            return True
    except HeldElsewhereError:
        return False


def test_a_run_holds_its_gpu_and_lets_go_of_it() -> None:
    with held_device("auto", None):
        assert not is_free("cuda-0")
        assert is_free("cuda-1")
    assert is_free("cuda-0")


def test_a_run_that_fails_lets_go_of_its_gpu() -> None:
    with pytest.raises(ZeroDivisionError), held_device("cuda:1", None):
        raise ZeroDivisionError
    assert is_free("cuda-1")


def test_a_run_in_shards_holds_all_gpus_that_it_may_use() -> None:
    with held_device("auto", None, all_of_them=True):
        assert not is_free("cuda-0") and not is_free("cuda-1")
    with held_device("cuda:1", None, all_of_them=True):
        assert is_free("cuda-0") and not is_free("cuda-1")


def test_a_cpu_is_not_held() -> None:
    with held_device("cpu", "gpu"):
        assert not (cache_dir() / "devices").exists()


def test_who_waits_is_told_for_whom_and_goes_on_when_the_holder_is_killed(
    holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    monkeypatch.setattr("tasks.devices.time.sleep", lambda seconds: asked.set())

    def kill_once_asked() -> None:
        asked.wait()
        holder.kill()

    killer = threading.Thread(target=kill_once_asked)
    killer.start()
    with caplog.at_level("INFO", logger="tasks.devices"), held_device("cuda:0", None):
        killer.join()
    assert f"waiting for cuda:0, which is used by process {holder.pid} on" in caplog.text
