"""Part 5: one run at a time on a device, and its memory given back between stages."""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from bench.checks.rows import Bench, Check, Row
from bench.gpu_parts import machine, models

HOLDS_DEVICE = """
import sys
from tasks.server.devices import held_device
with held_device(sys.argv[1], None):
    print("held", flush=True)
    sys.stdin.read()
"""
HOLDS_FILE = """
import sys, time
from pathlib import Path
from tasks.core.locking import HeldElsewhereError, owned_lock
while True:
    try:
        with owned_lock(Path(sys.argv[2])):
            print("held", flush=True)
            sys.stdin.read()
        break
    except HeldElsewhereError:
        time.sleep(0.1)
"""
# A process waits until it knows that it must; then it looks again every two seconds.
WAITS_SECONDS, GETS_IT_SECONDS = 2.0, 40.0


def _device_lock(bench: Bench) -> Iterator[Row]:
    """The second process waits; when the first is killed, it goes on."""
    with_prefect = bench.on_gpu and importlib.util.find_spec("prefect") is not None
    code = HOLDS_DEVICE if with_prefect else HOLDS_FILE
    command = [sys.executable, "-c", code, bench.device, str(bench.folder / "device.lock")]
    with ExitStack() as held:

        def holder() -> subprocess.Popen[str]:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            held.callback(process.wait)
            held.callback(process.kill)
            return process

        first = holder()
        got_first = _says_held(first, GETS_IT_SECONDS)
        second = holder()
        waited = not _says_held(second, WAITS_SECONDS + (8.0 if with_prefect else 0.0))
        first.kill()
        got_second = _says_held(second, GETS_IT_SECONDS)
    what = "tasks.server.devices" if with_prefect else "the lock file alone, without Prefect"
    seen = f"{what}: first {got_first}, second waited {waited}, and went on after the first was killed {got_second}"
    yield bench.judged_on_gpu("device lock", got_first and waited and got_second, seen)


def _says_held(process: subprocess.Popen[str], seconds: float) -> bool:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return bool(ready) and process.stdout.readline().strip() == "held"


def _isolation(bench: Bench) -> Iterator[Row]:
    """A run in a child leaves no memory of the card in this process, not even a context."""
    from tasks.core.config import load_config
    from tasks.inferencer import Inferencer

    before = machine.used_mib(bench.device)
    rows = 4 if bench.tiny else 40
    path = bench.folder / "few-questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n}?"}) + "\n" for n in range(rows)))
    overrides = {
        "inferencer.model": models.small_model(bench), "inferencer.testing_data_id": str(path),
        "inferencer.max_new_tokens": 8, "inferencer.temperature": 0, "inferencer.device": bench.device,
        "inferencer.run_name": "isolated", "pipeline.runs_dir": str(bench.folder / "runs"),
        "pipeline.models_dir": str(bench.folder / "models"),
        "inferencer.isolation": "auto" if bench.on_gpu else "process",
    }  # fmt: skip
    inferencer = Inferencer(load_config(None, overrides))
    isolated, manifest = inferencer.generates_in_child, inferencer.infer()
    kept = _kept_mib(bench, before)
    seen = f"in a child: {isolated}; {manifest.row_count} rows; {_mib(kept)} of the card kept afterwards"
    given_back = kept is None or kept <= machine.GIVEN_BACK_MIB
    yield bench.judged_on_gpu("a run in a child gives all back", isolated and given_back, seen)


def _training(bench: Bench) -> Iterator[Row]:
    """Training in this process: its tensors are gone afterwards, and the cached blocks given back."""
    from tasks.core.memory.device_memory import peak_bytes

    rows_path = models.training_rows(bench, "stage-rows", 16)
    trained = models.training(bench, "stage", rows_path)
    models.forget(bench)
    allocated, reserved = _torch_mib(bench)
    seen = (
        f"{trained.manifest.steps} steps, peak {peak_bytes(bench.device) / 2**20:.0f} MiB; after it "
        f"{_mib(allocated)} in tensors, {_mib(reserved)} in blocks"
    )
    given_back = reserved is None or reserved <= machine.GIVEN_BACK_MIB
    yield bench.judged_on_gpu("training gives its memory back", given_back, seen)


def _kept_mib(bench: Bench, before: int | None) -> int | None:
    if before is None:
        return None
    after = machine.settled_mib(bench.device, before)
    return None if after is None else after - before


def _torch_mib(bench: Bench) -> tuple[int | None, int | None]:
    """MiB in tensors and in the allocator's blocks of this process."""
    if not bench.on_gpu:
        return None, None
    import torch

    return torch.cuda.memory_allocated() // 2**20, torch.cuda.memory_reserved() // 2**20


def _mib(count: int | None) -> str:
    return "unknown MiB" if count is None else f"{count} MiB"


CHECKS = (
    Check("isolation", _isolation, 20, 60),  # first: its process must not have touched the card
    Check("training gives back", _training, 12, 60),
    Check("device lock", _device_lock, 20, 100),
)
