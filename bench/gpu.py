"""The first minutes on a GPU: `python bench/gpu.py` proves what works, and measures; offline, in at most eight minutes.

What a machine without a network lacks is carried as wheels. Where there is one, for its Python:

    make gpu-wheels GPU_PYTHON=3.12      (GPU_HAS=FILE: what `pip freeze` says there, which is then left out)

On the machine with the GPU, in a copy of this repository with the folder gpu-wheels, beside a PyTorch for CUDA:

    python -m pip install --no-index --no-deps --find-links gpu-wheels -r gpu-wheels/requirements.txt
    python bench/gpu.py --out gpu.json

Parts, most important first: equality, oom, quantised, speed, locks, flow. Each runs in processes of its own; one that
crashes, hangs or lacks a library becomes a row that says so. The JSON file is written anew after every row. A row
is `passed` or `failed`, `measured` (a figure that nothing is asked of), `skipped` or `not run`, with the reason.
`--device cpu --tiny` rehearses everything with tiny models; what only a GPU can show is `skipped` there.
Ends with 0 when nothing failed, 1 when something did, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository need not be installed

from bench.checks.results import Results
from bench.checks.rows import Outcome, Row, counted, table
from bench.checks.running import REHEARSAL_PATIENCE, Task, run_checks
from bench.gpu_parts import machine

PARTS = ("equality", "oom", "quantised", "speed", "locks", "flow")
HIDDEN_PARTS = ("faults",)
BUDGET_SECONDS = 480.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    options = _options(arguments)
    started = time.monotonic()
    problem = None if options.device == "cpu" else machine.cuda_problem()
    if problem is not None:
        print(
            f"no GPU to measure: {problem}\n  next: --device cpu --tiny rehearses the script", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    about = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"), "tiny": options.tiny,
        "budget_seconds": options.budget_seconds, "machine": machine.described(options.device),
    }  # fmt: skip
    results = Results(options.out, about)
    results.write()
    folder = Path(tempfile.mkdtemp(prefix="tuneproof-gpu-"))
    try:
        for part in options.parts:
            patience = REHEARSAL_PATIENCE if options.device == "cpu" else 1.0
            task = Task(part, options.device, options.tiny, folder, patience=patience)
            _run_part(task, started + options.budget_seconds, results)
        results.finished = True
    except KeyboardInterrupt:
        print("interrupted; what was done is kept", file=sys.stderr)
    finally:
        results.write()
        shutil.rmtree(folder, ignore_errors=True)
    _print(results, time.monotonic() - started, options.out)
    return int(not results.finished or any(row.outcome == "failed" for row in results.rows))


def _run_part(task: Task, end_at: float, results: Results) -> None:
    """Run one part and see whether the card's memory comes back after it."""
    checks = importlib.import_module(f"bench.gpu_parts.{task.part}").CHECKS
    before = machine.used_mib(task.device)
    run_checks(task, checks, end_at, results.add)
    name = "memory given back after the part"
    if before is None:
        reason = "needs a GPU" if task.device == "cpu" else "needs nvidia-smi"
        results.add([Row(name, "skipped", reason, part=task.part)])
        return
    after = machine.settled_mib(task.device, before) or 0
    outcome: Outcome = "passed" if after <= before + machine.GIVEN_BACK_MIB else "failed"
    seen = f"{before} MiB taken before, {after} MiB after"
    results.add([Row(name, outcome, seen, {"before_mib": before, "after_mib": after}, part=task.part)])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:N, or cpu for a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a rehearsal")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file; default: gpu.json")
    parser.add_argument(
        "--budget-seconds", type=float, default=BUDGET_SECONDS, help="what no longer fits is not run; default: 480"
    )  # fmt: skip
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    unknown = [name for name in wanted if name not in (*PARTS, *HIDDEN_PARTS)]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return wanted


def _print(results: Results, seconds: float, path: Path) -> None:
    print("\n".join(table(results.rows)))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in counted(results.rows).items() if count)
    print(f"\n{counts} in {seconds:.0f} s; all of it in {path}")


if __name__ == "__main__":
    sys.exit(main())
