"""Training speed: this project's steps beside transformers' usual ones, on the same rows and weights.

    .venv/bin/python -m bench.training [--rows FILE] [--steps N] [--model ID]
    .venv/bin/python -m bench.training --processes 2 [--rows FILE] [--steps N] [--model ID]

Prints tokens per second (padding excluded) of each way as a ratio to the usual one: batches in random order,
padded, with attention mask, fused attention, and the head computed for every token. The ways take turns, each
figure is the median of its steps, and the optimizer step is part of the time.

With --processes a whole training is done by one process of one thread, and by so many of one thread each, which share
its rows; and by TRL's trainer under torchrun, where trl is installed. The figure is that of all updates, without
loading, the median of --turns trainings that take turns. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from tasks.core.config import FineTunerConfig
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
from tasks.core.models.placement import choose_device
from tasks.core.models.specs import find_source
from tasks.core.training.methods.answer_loss import AnswerHead, summed_loss
from tasks.core.training.methods.batches import Collator, LengthGroupedOrder
from tasks.core.training.methods.rows import TokenizedRows
from tasks.core.training.methods.sft import read_training_data
from tasks.core.training.precision import choose_precision
from tasks.core.training.run import train

Step = Callable[[], int]


@dataclass(frozen=True)
class Way:
    """One way of training: what it leaves out of the usual work."""

    name: str
    grouped: bool
    answers_only: bool
    attention: str
    dtype: str | None = None
    autocast: bool = True


WAYS = (
    Way("usual: random batches, all logits", False, False, "sdpa"),
    Way("+ batches grouped by length", True, False, "sdpa"),
    Way("+ head at answers only, no mask", True, True, "sdpa"),
    Way("+ plain attention (ours, short rows)", True, True, "eager"),
    Way("ours without autocast", True, True, "eager", autocast=False),
    Way("ours with float32 weights and arithmetic", True, True, "eager", "float32", False),
)


@dataclass
class Contender:
    """A way with its own weights, optimizer and stream of batches."""

    way: Way
    step: Step
    rates: list[float] = field(default_factory=list)


def main() -> None:
    """Run the ways in turn and print the table."""
    options = _options()
    transformers_logging.set_verbosity_error()
    if options.processes > 1:
        _compare_processes(options)
        return
    config = FineTunerConfig(
        base_model_id=options.model,
        training_data_id=options.rows,
        max_rows=options.max_rows,
        max_sequence_length=options.max_sequence_length,
        device=options.device,
    )
    device = choose_device(config.device)
    spec = ModelSpec(config.base_model_id, device=device)
    loaded = load_model_and_tokenizer(spec)
    rows = read_training_data(config, loaded.tokenizer).train.rows
    precision = choose_precision(config, loaded.identity.dtype, device)
    contenders = [_contender(way, spec, precision.compute, rows, options.batch_size, device) for way in WAYS]
    for turn in range(options.steps + 1):
        for contender in contenders:
            started = time.perf_counter()
            tokens = contender.step()
            if turn:  # the first step of each warms up
                contender.rates.append(tokens / (time.perf_counter() - started))
    _print(contenders, rows, options, device, precision.compute)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", default="examples/quickstart/train.jsonl", help="training rows")
    parser.add_argument("--model", default=FineTunerConfig().base_model_id, help="base model")
    parser.add_argument("--steps", type=int, default=5, help="measured optimizer steps of each way")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a step")
    parser.add_argument("--max-rows", type=int, default=300)
    parser.add_argument("--max-sequence-length", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=3, help="trainings of each kind with --processes")
    parser.add_argument("--processes", type=int, default=1, help="compare one process with so many")
    options: argparse.Namespace = parser.parse_args()
    return options


def _compare_processes(options: argparse.Namespace) -> None:
    """The same training by one process and by several, ours and TRL's, in turn, and the ratios of their speeds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows = min(options.max_rows, options.steps * options.batch_size)
    config = FineTunerConfig(
        base_model_id=options.model,
        training_data_id=options.rows,
        max_rows=rows,
        max_sequence_length=options.max_sequence_length,
        device_train_batch_size=options.batch_size,
        grad_accumulation=1,
        epochs=1,
        save_steps=10**6,
        device="cpu",
    )
    spec = ModelSpec(config.base_model_id, device="cpu")
    dtype = choose_precision(config, load_model_and_tokenizer(spec).identity.dtype, "cpu").compute
    counts = (1, options.processes)
    seconds: dict[tuple[str, int], list[float]] = {("tuneproof", count): [] for count in counts}
    if importlib.util.find_spec("trl") is not None:
        seconds |= {("TRL under torchrun", count): [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for (way, count), found in seconds.items():
                if way == "tuneproof":
                    wanted = config.model_copy(update={"processes": count})
                    manifest = train(wanted, models_dir=Path(folder), run_name=f"{count}-{turn}").manifest
                    tokens = manifest.trained_tokens
                    found.append(manifest.seconds)
                else:
                    found.append(_usual_seconds(config, count, dtype == "bfloat16", Path(folder)))
    table = Table(title=f"{options.model}, {rows} rows, {tokens} tokens, {dtype}, one thread a process")
    for name in ("training", "processes", "tokens/s", "to its one process", "to ours"):
        table.add_column(name, justify="left" if name == "training" else "right")
    medians = {key: statistics.median(found) for key, found in seconds.items()}
    for (way, count), median in medians.items():
        ratios = (medians[way, 1] / median, medians["tuneproof", count] / median)
        table.add_row(way, str(count), f"{tokens / median:.0f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


def _usual_seconds(config: FineTunerConfig, processes: int, is_bf16: bool, folder: Path) -> float:
    """Seconds of the updates of TRL's trainer in so many ranks, which torchrun starts, on the same rows."""
    rows = [
        json.loads(line)
        for line in Path(str(config.training_data_id)).read_text(encoding="utf-8").splitlines()
    ]
    rows_path = folder / "rows.jsonl"
    turns = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows[: config.max_rows]
    ]
    rows_path.write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    model_dir = find_source(ModelSpec(config.base_model_id), with_weights=True).base.directory
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *(str(Path(__file__).parent / "training_parts" / "usual.py"), str(rows_path), str(model_dir)),
        *(str(config.device_train_batch_size), str(config.max_sequence_length), str(int(is_bf16))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _contender(
    way: Way, spec: ModelSpec, compute: str, rows: TokenizedRows, batch_size: int, device: str
) -> Contender:
    dtype = way.dtype or compute
    loaded = load_model_and_tokenizer(ModelSpec(spec.model_id, dtype=dtype, device=device))
    loaded.model.set_attn_implementation(way.attention)
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(loaded.model, lora).train()
    learning = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    head = AnswerHead(model)
    collator = Collator(rows, None, int(loaded.tokenizer.pad_token_id))
    batches = _batches(way, rows, batch_size)
    casting = way.autocast and dtype != "float32"

    def step() -> int:
        indices = next(batches)
        batch = collator(indices)
        tokens = int(batch.pop("token_count"))
        del batch["item_count"]
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16) if casting else nullcontext():
            if way.answers_only:
                logits = head.logits_at(model, batch["input_ids"], batch["positions"])
                loss = summed_loss(logits, batch["targets"]) / len(batch["targets"])
            else:
                loss = model(
                    input_ids=batch["input_ids"],
                    labels=_labels(batch),
                    attention_mask=_mask(rows, indices, batch["input_ids"]),
                    use_cache=False,
                ).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return tokens

    return Contender(way, step)


def _mask(rows: TokenizedRows, indices: list[int], input_ids: torch.Tensor) -> torch.Tensor:
    """1 where a token is, 0 where padding is; what a usual collator makes."""
    lengths = torch.tensor([len(rows[index][0]) for index in indices], device=input_ids.device)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (places[None] < lengths[:, None]).long()


def _labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model computes its own loss from: the target at each place, -100 elsewhere."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["positions"] + 1] = batch["targets"]
    return labels


def _batches(way: Way, rows: TokenizedRows, batch_size: int) -> Iterator[list[int]]:
    for epoch in itertools.count():
        if way.grouped:
            order = LengthGroupedOrder(rows.lengths, batch_size, seed=0)
            order.set_epoch(epoch + 1)
            indices = list(order)
        else:
            indices = np.random.default_rng(epoch).permutation(len(rows)).tolist()
        for start in range(0, len(indices) - batch_size + 1, batch_size):
            yield indices[start : start + batch_size]


def _print(
    contenders: list[Contender], rows: TokenizedRows, options: argparse.Namespace, device: str, compute: str
) -> None:
    table = Table(
        title=f"{options.model}\n{len(rows)} rows, {rows.token_count} tokens, {rows.target_count} learnt; "
        f"{options.batch_size} rows a step; {device}, {compute}, {torch.get_num_threads()} threads"
    )
    table.add_column("way")
    table.add_column("tokens/s", justify="right")
    table.add_column("ratio", justify="right")
    usual = statistics.median(contenders[0].rates)
    for contender in contenders:
        rate = statistics.median(contender.rates)
        table.add_row(contender.way.name, f"{rate:.0f}", f"{rate / usual:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
