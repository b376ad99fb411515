"""bench/gpu.py: every part is rehearsed on the CPU, and no fault of one hides what the others do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import gpu
from tests.making.prefect_api import give_database
from tests.making.warm.bench_workers import warm_workers

ROOT = Path(__file__).resolve().parents[2]
# What only a GPU can show, by part; everything else must pass or be measured on the CPU.
OUTCOMES = {"passed", "measured", "skipped"}


def command(out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "bench/gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
        *options,
    ]


def run(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(command(out, *options), capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr[-3000:]
    return done.returncode, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["equality", "oom", "quantised", "speed", "locks", "flow"])
def test_every_check_of_a_part_reports_in_a_rehearsal(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part == "flow":  # its server need not make the database that each test process has a copy of
        give_database(tmp_path, tmp_path.parent)
        url = f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}"
        monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    options = ("--parts", part, "--budget-seconds", "1800")
    with warm_workers():
        code = gpu.main(command(tmp_path / "gpu.json", *options)[2:])
    results = json.loads((tmp_path / "gpu.json").read_text())
    rows = results["rows"]
    assert code == 0 and results["finished"], [row for row in rows if row["outcome"] not in OUTCOMES]
    assert {row["part"] for row in rows} == {part}
    assert {row["outcome"] for row in rows} <= OUTCOMES
    skipped = [row["seen"] for row in rows if row["outcome"] == "skipped"]
    assert all("needs a GPU" in seen or "not here" in seen or "needs Prefect" in seen for seen in skipped)
    assert len(rows) > 1 and rows[-1]["check"] == "memory given back after the part"


def test_a_crash_a_hang_and_a_missing_library_are_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    code, results = run(tmp_path / "gpu.json", "--parts", "faults")
    rows = {row["check"]: row for row in results["rows"]}
    assert code == 1 and results["finished"]
    expected = {
        "crashes": "SIGSEGV", "lacks a library": "ModuleNotFoundError", "exits": "exit code 7",
        "is killed": "SIGKILL", "hangs": "no end within",
    }  # fmt: skip
    for check, cause in expected.items():
        assert rows[check]["outcome"] == "failed" and cause in rows[check]["seen"]
    assert rows["before the crash"]["figures"] == {"rows": 1}
    assert rows["passes"]["outcome"] == "passed"


def test_what_no_longer_fits_is_told_and_not_run(tmp_path: Path) -> None:
    code, results = run(tmp_path / "gpu.json", "--parts", "equality,speed", "--budget-seconds", "0")
    checks = [row for row in results["rows"] if row["check"] != "memory given back after the part"]
    assert code == 0 and len(checks) == 11
    assert all(row["outcome"] == "not run" and row["seen"].startswith("time: ") for row in checks)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_cut_off_leaves_a_whole_file_and_no_process(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    bench = subprocess.Popen(
        command(out, "--parts", "faults"), env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("*/hanging-child")):
        time.sleep(0.1)
    started = psutil.Process(bench.pid).children(recursive=True)
    assert started
    bench.send_signal(number)
    bench.wait(30)
    results = json.loads(out.read_text())
    assert not results["finished"]
    assert {"crashes", "exits"} <= {row["check"] for row in results["rows"]}
    workers = [process for process in started if process in psutil.process_iter()]
    _, alive = psutil.wait_procs(workers if number == signal.SIGTERM else started[:1], timeout=60)
    assert not alive


def test_without_a_gpu_the_script_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu.py")], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr
