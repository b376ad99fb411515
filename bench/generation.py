"""Generation side by side: `python bench/generation.py [--workload mixed] [--dtype bfloat16] [--rounds 3]`.

Each measurement runs in a process of its own, methods interleaved, so that peak memory is that of one method
and drift of the machine meets all alike. Prints medians: tokens per second, ratio to one at a time, peak
memory, and how many rows got the answer that they get alone (in float32 all should; in bfloat16 rounding
differs between batch shapes for every method). Other libraries that are installed or named by an option are
rows as well, see peers.py. `--references` measures how long the scoring of 100 references takes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository need not be installed

from bench import peers
from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.choosing import engine_classes
from tasks.core.generation.engines.sorted_batches import SortedBatchEngine
from tasks.core.generation.reference_scorer import ReferenceScorer
from tasks.core.memory.budget import TokenBudget
from tasks.core.memory.device_memory import peak_bytes
from tasks.core.models.loading import LoadedModel, ModelSpec, load_model_and_tokenizer, load_tokenizer
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_ROWS = 200
TOPICS = [
    "a market",
    "a train",
    "two farms",
    "the harbour",
    "a bakery",
    "an orchestra",
    "the school",
    "a river",
]


@dataclass(frozen=True)
class Workload:
    """Questions and the longest answer each may have."""

    questions: list[str]
    answer_tokens: list[int]
    system: str | None = None


def workload(name: str) -> Workload:
    """Return one of the three workloads, the same on every machine, or the first 200 questions of a file."""
    source = random.Random(7)
    if name == "mixed":  # 64 chat prompts of about 50 to 520 tokens, 64 new tokens
        return Workload([_story(source, 1 + int(22 * source.random() ** 1.7)) for _ in range(64)], [64] * 64)
    if name == "long-tail":  # 256 prompts; most answers are short, a few are long
        lengths = [min(256, 4 + int(source.paretovariate(1.1) * 6)) for _ in range(256)]
        return Workload([_story(source, source.randint(1, 8)) for _ in range(256)], lengths)
    if name == "shared-prefix":  # 128 prompts that begin with the same 300 tokens
        return Workload([_story(source, 2) for _ in range(128)], [32] * 128, system=_story(source, 14))
    if name.endswith(".jsonl"):  # a file of questions of one's own
        with Path(name).open(encoding="utf-8") as file:
            questions = [json.loads(line)["question"] for line in itertools.islice(file, FILE_ROWS)]
        return Workload(questions, [64] * len(questions))
    raise SystemExit(f"no workload {name!r}: use mixed, long-tail, shared-prefix or a .jsonl file")


def _story(source: random.Random, sentences: int) -> str:
    parts = [
        f"On day {source.randint(1, 99)} near {source.choice(TOPICS)}, {source.randint(2, 900)} people "
        f"counted {source.randint(2, 900)} boxes."
        for _ in range(sentences)
    ]
    return " ".join([*parts, "How many boxes were there on the first day, and why?"])


def requests_of(tokenizer: PreTrainedTokenizerBase, work: Workload) -> list[Request]:
    """Prompts through the chat template; row i may answer with `answer_tokens[i]` tokens."""
    requests = []
    for place, (question, limit) in enumerate(zip(work.questions, work.answer_tokens, strict=True)):
        messages = [{"role": "user", "content": question}]
        if work.system is not None:
            messages.insert(0, {"role": "system", "content": work.system})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        requests.append(Request(place, f"row-{place}", ids, limit))
    return requests


def queue_of(requests: list[Request]) -> RequestQueue:
    """All requests in one queue, with what they share."""
    shared = requests[0].token_ids[:-1]
    for request in requests:
        length = next(
            (i for i, (a, b) in enumerate(zip(shared, request.token_ids[:-1], strict=False)) if a != b),
            min(len(shared), len(request.token_ids) - 1),
        )
        shared = shared[:length]
    return RequestQueue(
        range(len(requests)), [len(request.token_ids) for request in requests], requests.__getitem__,
        shared_prefix=shared, largest_answer_tokens=max(request.max_new_tokens for request in requests),
    )  # fmt: skip


Method = Callable[[LoadedModel, list[Request]], dict[int, tuple[int, ...]]]


def one_at_a_time(model: LoadedModel, requests: list[Request]) -> dict[int, tuple[int, ...]]:
    """Run the loop that people write: `generate` for each row, with nothing of ours."""
    import torch

    answers = {}
    for request in requests:
        input_ids = torch.tensor([request.token_ids], device=model.device)
        output = model.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id,
        )
        answers[request.position] = tuple(output[0, input_ids.shape[1] :].tolist())
    return answers


def through_engine(name: str, rows: int) -> Method:
    """Run one of our engines with at most `rows` rows at once."""

    def run(model: LoadedModel, requests: list[Request]) -> dict[int, tuple[int, ...]]:
        settings = GenerationSettings(max_new_tokens=max(request.max_new_tokens for request in requests))
        engine = engine_classes()[name](model, settings)
        answered = engine.generate(queue_of(requests), TokenBudget(10**9, rows))
        return {row.position: row.token_ids for row in answered}

    return run


def in_dataset_order(model: LoadedModel, requests: list[Request]) -> dict[int, tuple[int, ...]]:
    """Run `generate` over 16 rows at a time as they come."""
    settings = GenerationSettings(max_new_tokens=max(request.max_new_tokens for request in requests))
    engine, answers = SortedBatchEngine(model, settings), {}
    for start in range(0, len(requests), 16):
        part = requests[start : start + 16]
        width = max(len(request.token_ids) for request in part)
        found, _faults = engine._answer(part, width)
        for request, ids in zip(part, found, strict=True):
            answers[request.position] = engine._stop.cut(ids, request.max_new_tokens)[0]
    return answers


def pipeline(model: LoadedModel, requests: list[Request]) -> dict[int, tuple[int, ...]]:
    """Run transformers' text-generation pipeline with batches of 16."""
    from transformers import GenerationConfig
    from transformers import pipeline as build

    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    generator = build("text-generation", model=model.model, tokenizer=tokenizer)
    longest = max(request.max_new_tokens for request in requests)
    config = GenerationConfig(max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = [tokenizer.decode(request.token_ids) for request in requests]
    outputs = generator(
        texts, batch_size=16, return_full_text=False, generation_config=config, add_special_tokens=False
    )
    answers = {}
    for place, (output, request) in enumerate(zip(outputs, requests, strict=True)):
        ids = tokenizer(output[0]["generated_text"], add_special_tokens=False)["input_ids"]
        answers[place] = tuple(ids[: request.max_new_tokens])
    return answers


METHODS: dict[str, Method] = {
    "one at a time": one_at_a_time,
    "pipeline, 16": pipeline,
    "generate, dataset order, 16": in_dataset_order,
    "generate, sorted, 16": through_engine("generate", 16),
    "generate, sorted, 64": through_engine("generate", 64),
    "in flight, 64 (ours)": through_engine("inflight", 64),
}


def references(dtype: str, rounds: int, count: int = 100) -> Iterator[str]:
    """Score short references in padded batches and in the steps of answers, by turns in this process.

    Yields the lines of a table: medians of the processor's time, and both ways' mean loss of a token.
    """
    model = load_model_and_tokenizer(ModelSpec(peers.MODEL, dtype=dtype, device="cpu"))
    source = random.Random(7)
    work = Workload([_story(source, source.randint(1, 4)) for _ in range(count)], [0] * count)
    end = model.tokenizer.eos_token_id
    asked, texts, starts = requests_of(model.tokenizer, work), {}, {}
    for request in asked:
        answer = model.tokenizer(f"{source.randint(2, 900)} boxes.", add_special_tokens=False)["input_ids"]
        starts[request.position] = len(request.token_ids)
        texts[request.position] = replace(request, token_ids=(*request.token_ids, *answer, end))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, float] = {}
    for _, packs in itertools.product(range(rounds), (False, True)):
        scorer = ReferenceScorer(model, starts, packs=packs)
        started = time.process_time()
        rows = list(scorer.generate(queue_of(list(texts.values())), TokenBudget(10**9, 64)))
        seconds[packs].append(time.process_time() - started)
        tokens = sum(len(texts[row.position].token_ids) - starts[row.position] for row in rows)
        losses[packs] = sum(scorer.losses.values()) / tokens
    before = statistics.median(seconds[False])
    yield f"{count} references, {dtype}, median of {rounds}"
    yield ""
    yield "| scored in | processor seconds | ratio | loss of a token |"
    yield "|---|---|---|---|"
    for packs, name in ((False, "padded batches"), (True, "the steps of answers")):
        median = statistics.median(seconds[packs])
        yield f"| {name} | {median:.1f} | {before / median:.1f} | {losses[packs]:.5f} |"


def prepared(method: str, options: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, peers.Peer]:
    """Load what one method needs and nothing else."""
    if method not in METHODS:
        tokenizer = load_tokenizer(ModelSpec(peers.MODEL))
        return tokenizer, peers.available(options)[method](tokenizer)
    model = load_model_and_tokenizer(ModelSpec(peers.MODEL, dtype=options.dtype, device="cpu"))
    return model.tokenizer, functools.partial(METHODS[method], model)


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one method once in this process."""
    tokenizer, run = prepared(method, options)
    requests = requests_of(tokenizer, workload(options.workload))
    run([Request(0, "warm", requests[0].token_ids[:8], 2)])
    started = time.perf_counter()
    answers = run(requests)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": sum(map(len, answers.values())),
        "peak_bytes": None if method == peers.ENDPOINT else peak_bytes("cpu"),  # a server's is its own
        "answers": [list(answers[place]) for place in range(len(requests))],
    }


def in_own_process(method: str, *options: str) -> dict[str, Any]:
    """Run one measurement in a fresh interpreter; `options` come after those of this process and outdo them."""
    command = [sys.executable, __file__, *sys.argv[1:], *options, "--one", method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(name: str, dtype: str, rounds: int, methods: list[str], converted: str) -> Iterator[str]:
    """Measure and yield the lines of a Markdown table."""
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for number in range(rounds):
        for method in methods:
            run = in_own_process(method, "--workload", name, "--dtype", dtype, "--converted", converted)
            results[method].append(run)
            print(f"  round {number + 1}: {method} {run['seconds']:.1f} s", file=sys.stderr)
    base = results[methods[0]]
    alone = base[0]["answers"]
    slow = statistics.median(run["tokens"] / run["seconds"] for run in base)
    yield f"{name}, {dtype}, {len(alone)} rows, {base[0]['tokens']} tokens, median of {rounds}"
    yield ""
    yield "| method | tokens/s | ratio | peak memory, MiB | rows as alone |"
    yield "|---|---|---|---|---|"
    for method, runs in results.items():
        speed = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        peaks = [run["peak_bytes"] / 2**20 for run in runs if run["peak_bytes"] is not None]
        peak = f"{statistics.median(peaks):.0f}" if peaks else "-"
        same = sum(mine == theirs for mine, theirs in zip(runs[0]["answers"], alone, strict=True))
        yield f"| {method} | {speed:.0f} | {speed / slow:.1f} | {peak} | {same} of {len(alone)} |"


def main() -> None:
    """Parse the command line; print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default="mixed,long-tail,shared-prefix", help="separated by commas")
    parser.add_argument("--dtype", default="bfloat16,float32", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="default: all; ratios are to the first; quote each name"
    )
    parser.add_argument("--references", action="store_true", help="score references instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    peers.add_arguments(parser)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    if options.references:
        for dtype in options.dtype.split(","):
            print("\n".join(references(dtype, options.rounds)), end="\n\n", flush=True)
        return
    known = [*METHODS, *peers.available(options)]
    methods = options.methods or known
    if unknown := [method for method in methods if method not in known]:
        parser.error(f"no method {unknown[0]!r}; there are: {'; '.join(known)}")
    with tempfile.TemporaryDirectory() as converted:
        if any(method.startswith("ctranslate2") for method in methods):
            peers.convert(Path(converted))
        for name, dtype in itertools.product(options.workload.split(","), options.dtype.split(",")):
            for line in table(name, dtype, options.rounds, methods, converted):
                print(line, flush=True)
            print()


if __name__ == "__main__":
    main()
