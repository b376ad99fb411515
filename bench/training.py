"""Training speed: this project's steps beside transformers' usual ones, on the same rows and weights.

    .venv/bin/python -m bench.training [--rows FILE] [--steps N] [--model ID]
    .venv/bin/python -m bench.training --processes 2 [--rows FILE] [--steps N] [--model ID]

Prints tokens per second (padding excluded) of each way as a ratio to the usual one: batches in random order,
padded, with attention mask, fused attention, and the head computed for every token. The ways take turns, each
figure is the median of its steps, and the optimizer step is part of the time.

With --processes a whole training is done by one process of one thread, and by so many of one thread each, which share
its rows; the figure is that of all updates, without loading. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
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
    parser.add_argument("--processes", type=int, default=1, help="compare one process with so many")
    options: argparse.Namespace = parser.parse_args()
    return options


def _compare_processes(options: argparse.Namespace) -> None:
    """The same training by one process and by several, twice each in turn, and the ratio of their speeds."""
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
    rates: dict[int, list[float]] = {1: [], options.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for processes, found in rates.items():
                wanted = config.model_copy(update={"processes": processes})
                manifest = train(wanted, models_dir=Path(folder), run_name=f"{processes}-{turn}").manifest
                found.append(manifest.trained_tokens / manifest.seconds)
    table = Table(title=f"{options.model}, {rows} rows, one thread a process")
    for name in ("processes", "tokens/s", "ratio"):
        table.add_column(name, justify="right")
    for processes, found in rates.items():
        table.add_row(str(processes), f"{max(found):.0f}", f"{max(found) / max(rates[1]):.2f}")
    Console().print(table)


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
