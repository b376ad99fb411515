"""Runs that are killed again and again: `python bench/kills.py [--runs 200]`.

Each run answers short rows with a tiny model and is killed with SIGKILL at a random moment of the time that it
takes undisturbed, resumed with another batch size, perhaps killed again, and at last left to finish. A run that
ended before its first kill is started again, so that every run that counts was killed. Its file must equal that of
a run that nobody disturbed (timings aside), with no row lost or doubled. Prints a table; ends with status 1 at the
first difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' tiny model
os.environ["OMP_NUM_THREADS"] = "1"  # one thread, so that a process can be forked once torch is loaded

import contextlib

from tasks.core.config import Config, load_config
from tasks.core.generation.run_dir import RunDir
from tasks.inferencer import Inferencer
from tests.conftest import build_tiny_model, build_tiny_tokenizer

ROWS = 120
BATCH_SIZES = (1, 4, 9, 32)
MOST_KILLS = 3


def settings(folder: Path, runs_dir: Path, batch_size: int) -> Config:
    """Return the settings of one attempt; sampled, so that draws would show any difference."""
    return load_config(
        None,
        {
            "inferencer.model": str(folder / "model"), "inferencer.testing_data_id": str(folder / "rows.jsonl"),
            "inferencer.max_new_tokens": 16, "inferencer.temperature": 0.8, "inferencer.device": "cpu",
            "inferencer.batch_size": batch_size, "inferencer.run_name": "run", "pipeline.runs_dir": str(runs_dir),
            "pipeline.models_dir": str(folder / "models"), "inferencer.score_references": False,
        },
    )  # fmt: skip


def attempt(config: Config, kill_after_seconds: float | None) -> bool:
    """Run in a forked process; returns whether it came to its end."""
    child = os.fork()
    if child == 0:
        own_stderr = sys.stderr
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - the child's own, closed by its end
            Inferencer(config).infer()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=own_stderr)
            os._exit(1)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("an attempt failed by itself, see above")
    return os.WIFEXITED(status)


def published(runs_dir: Path) -> list[dict[str, Any]]:
    """Return the published rows without what may differ: seconds and batch size."""
    rows = [json.loads(line) for line in RunDir(runs_dir / "run").predictions_path.read_bytes().splitlines()]
    for row in rows:
        del row["metadata"]["inference_time"], row["metadata"]["batch_size"]
    return rows


def prepare(folder: Path) -> None:
    """Write model and rows; load what every child needs before the first fork."""
    tokenizer = build_tiny_tokenizer()
    build_tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(ROWS):
            row = {"question": f"How many {'more ' * (number % 9)}has {number}?", "answer": "1"}
            file.write(json.dumps(row) + "\n")
    import datasets
    import peft
    import torch

    torch.set_num_threads(1)
    del datasets, peft


def undisturbed_seconds(folder: Path, batch_size: int) -> float:
    """Run once without a kill; returns what it took."""
    started = time.perf_counter()
    attempt(settings(folder, folder / f"undisturbed-{batch_size}", batch_size), None)
    return time.perf_counter() - started


def killed_run(
    folder: Path, runs_dir: Path, seconds: dict[int, float], source: random.Random
) -> Counter[str]:
    """Do one run with 1 to `MOST_KILLS` kills, each at a random moment; returns what happened."""
    counted: Counter[str] = Counter()
    wanted = source.randint(1, MOST_KILLS)
    while True:
        batch_size = source.choice(BATCH_SIZES)
        delay = source.uniform(0.0, seconds[batch_size]) if counted["kills"] < wanted else None
        done = attempt(settings(folder, runs_dir, batch_size), delay)
        if done and counted["kills"]:
            return counted
        if done:
            counted["ended before the first kill, started again"] += 1
            shutil.rmtree(runs_dir)
            continue
        ledger_path = RunDir(runs_dir / "run").ledger_path
        lines = ledger_path.read_bytes().count(b"\n") if ledger_path.exists() else 0
        when = (
            "before the first row"
            if lines == 0
            else "after the last row"
            if lines == ROWS
            else "between rows"
        )
        counted["kills"] += 1
        counted[f"killed {when}"] += 1


def main() -> None:
    """Parse the command line; run; print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    source = random.Random(1)
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        seconds = {batch_size: undisturbed_seconds(folder, batch_size) for batch_size in BATCH_SIZES}
        expected = published(folder / f"undisturbed-{BATCH_SIZES[0]}")
        for number in range(options.runs):
            runs_dir = folder / f"run-{number}"
            happened = killed_run(folder, runs_dir, seconds, source)
            counted += happened
            counted["runs killed at least once"] += happened["kills"] > 0
            lines = RunDir(runs_dir / "run").ledger_path.read_bytes().splitlines()
            ids = [json.loads(line)["id"] for line in lines]
            counted["rows doubled"] += len(ids) - len(set(ids))
            counted["rows lost"] += ROWS - len(set(ids))
            counted["runs with the same file"] += published(runs_dir) == expected
            if counted["runs with the same file"] <= number:
                raise SystemExit(f"run {number} ended in another file")
            print(f"\r{number + 1} of {options.runs} runs, {counted['kills']} kills", end="", file=sys.stderr)
            shutil.rmtree(runs_dir)
    print_table(options.runs, counted)


def print_table(runs: int, counted: Counter[str]) -> None:
    """Print what was counted, in an order that can be read."""
    moments = ("before the first row", "between rows", "after the last row")
    shown = {
        "runs": runs, "rows each": ROWS, "runs killed at least once": counted["runs killed at least once"],
        "kills in total": counted["kills"], **{f"killed {when}": counted[f"killed {when}"] for when in moments},
        "rows doubled": counted["rows doubled"], "rows lost": counted["rows lost"],
        "runs with the same file": counted["runs with the same file"],
    }  # fmt: skip
    print("\n| | |\n|---|---|")
    for what, count in shown.items():
        print(f"| {what} | {count} |")
    again = counted["ended before the first kill, started again"]
    print(f"\n{again} runs ended before their first kill and were started again; they are not in the table.")


if __name__ == "__main__":
    main()
