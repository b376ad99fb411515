"""Prefect's server stopped, killed, or gone for good while a run answers: no row and no second waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.checks.rows import Bench, Row
from bench.torture_parts.stage import Stage, seen_harm
from bench.torture_parts.trials import Ended, Harm, Tally

PART = "servers"
_ROWS = 4000
_OUT_SECONDS = 15.0
_START_SECONDS = 150.0
_RUN_SECONDS = 180.0
# A run that waits for its server answers next to nothing; the machine may be busy with more than this.
_SLOWEST = 0.3


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Run once for each kind of outage; in a short run none."""
    if bench.tiny:
        yield Row("Prefect's server", "skipped", "starts a real server: not in the short form", part=PART)
        return
    stage = Stage(bench.folder / "stage")
    rows_path = stage.folder / "many.jsonl"
    rows_path.write_text(
        "".join(f'{{"question": "How many has {n}?", "answer": "{n}"}}\n' for n in range(_ROWS))
    )
    for kind in ("stopped", "killed and started again", "killed for good"):
        tally = Tally(PART, kind)
        harm, seen = _outage(bench, stage, rows_path, kind)
        tally.count(harm)
        yield tally.row(seen)


@dataclass
class _Server:
    """A Prefect server on a free port, with a folder of its own."""

    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of commands that use it."""
        url = f"http://127.0.0.1:{self.port}/api"
        return {**os.environ, "PREFECT_HOME": str(self.home), "PREFECT_API_URL": url}

    def start(self) -> None:
        """Start it and wait until it answers. Raises RuntimeError."""
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(self.port), "--no-ui"]
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end_at = time.monotonic() + _START_SECONDS
        while time.monotonic() < end_at:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health"),
            ):
                return
            time.sleep(0.2)
        raise RuntimeError("prefect server did not start")

    def signal(self, number: signal.Signals) -> None:
        """Signal the server and its own processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Kill it, stopped or not."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def _outage(bench: Bench, stage: Stage, rows_path: Path, kind: str) -> tuple[Harm, str]:
    place = bench.folder / "outage"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    server = _Server(place, _free_port())
    log_path = place / "infer.log"
    try:
        server.start()
        started = time.monotonic()
        with log_path.open("wb") as log:
            run = subprocess.Popen(
                [sys.executable, "-m", "flows", "infer", *_settings(stage, place, rows_path)],
                env=server.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        ledger_path = place / "runs" / "run" / "ledger.jsonl"
        before, during = _through_outage(server, run, ledger_path, kind)
        try:
            code: int | None = run.wait(max(1.0, started + _RUN_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            code = None
    finally:
        server.end()
    ended = Ended(code, log_path.read_text(errors="replace"), time.monotonic() - started)
    seen = f"rows in 10 s: {before:.0f} before, {during:.0f} while it was away; ended with {code}"
    return _judged(ended, place, before, during, seen), seen


def _through_outage(
    server: _Server, run: subprocess.Popen[bytes], ledger_path: Path, kind: str
) -> tuple[float, float]:
    """Take the server away once rows are being answered; give rows in 10 s before and during."""
    while run.poll() is None and _lines(ledger_path) < 50:
        time.sleep(0.1)
    before = _rate(ledger_path, run, 3.0)
    server.signal(signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
    during = _rate(ledger_path, run, _OUT_SECONDS)
    if kind == "stopped":
        server.signal(signal.SIGCONT)
    elif kind == "killed and started again":
        server.end()
        server.start()
    return before, during


def _judged(ended: Ended, place: Path, before: float, during: float, seen: str) -> Harm:
    harm = seen_harm(ended)
    output_path = place / "runs" / "run" / "inferencer_output.jsonl"
    ids = (
        [json.loads(line)["id"] for line in output_path.read_bytes().splitlines()]
        if output_path.exists()
        else []
    )
    harm.lost += _ROWS - len(set(ids))
    harm.doubled += len(ids) - len(set(ids))
    if ended.code not in (0, None):
        harm.lost += 1
    if during < _SLOWEST * before:
        harm.hung += 1
    if harm.any:
        harm.notes.append(seen)
    return harm


def _settings(stage: Stage, place: Path, rows_path: Path) -> list[str]:
    values = {
        "inferencer.model": stage.model_dir, "inferencer.testing-data-id": rows_path, "inferencer.run-name": "run",
        "inferencer.max-new-tokens": 24, "inferencer.device": "cpu", "inferencer.batch-size": 16,
        "inferencer.score-references": "false", "pipeline.runs-dir": place / "runs",
        "pipeline.models-dir": place / "models",
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _rate(ledger_path: Path, run: subprocess.Popen[bytes], seconds: float) -> float:
    """Rows in 10 s, over at most some seconds while the run goes on."""
    begun, started = _lines(ledger_path), time.monotonic()
    while run.poll() is None and time.monotonic() < started + seconds and _lines(ledger_path) < _ROWS:
        time.sleep(0.1)
    return 10.0 * (_lines(ledger_path) - begun) / max(0.1, time.monotonic() - started)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
