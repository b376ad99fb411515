"""Part 2: memory runs out for real, and every row is answered; processes die, and the run goes on."""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.checks.rows import Bench, Check, Row
from bench.gpu_parts import models

if TYPE_CHECKING:
    from tasks.core.generation.batching import Request
    from tasks.core.memory.budget import BudgetStore, TokenBudget
    from tasks.core.models.loading import LoadedModel
    from tasks.inferencer import Inferencer

FAR_TOO_MANY_TOKENS = 10**9
# Few weights and a large cache: so many tokens fill a card, whatever its size.
TOKENS_THAT_FILL = 100_000
PROMPT_TOKENS, ANSWER_TOKENS = 1000, 24
# A rehearsal fills memory with prompts too; each further token would only read it all again.
REHEARSED_ANSWER_TOKENS = 3
# On the CPU the process may take so much more than it has: below about 500 MiB native code crashes instead.
CPU_HEADROOM_BYTES = 600 * 2**20
LEFT_FOR_TRAINING_BYTES = 5 * 2**30
_M_MMAP_THRESHOLD = -3


def _ladder(bench: Bench) -> Iterator[Row]:
    """A budget far too high, then the same with what was learned, then with half of the card gone."""
    from tasks.core.memory.budget import FileBudgetStore

    model, asked = _hungry(bench)
    store = FileBudgetStore(bench.folder / "learned.json")
    with _little_memory(bench):
        first = _answered(model, asked, store)
        seen, figures = _told(first, asked)
        yield bench.judged("budget far too high", first.complete and first.shortages > 0, seen, figures)
        second = _answered(model, asked, store)
        seen, figures = _told(second, asked)
        fewer = second.complete and second.shortages < first.shortages
        yield bench.judged("the run after it starts lower", fewer, seen, figures)
    models.forget(bench)
    with _neighbour(bench, _free_bytes(bench) // 2):
        third = _answered(model, asked if bench.on_gpu else asked[:8], store)
    seen, figures = _told(third, asked if bench.on_gpu else asked[:8])
    yield bench.judged_on_gpu("a neighbour takes half", third.complete, seen, figures)


class _Session:
    """What became of one session: answered rows and the steps of the ladder."""

    def __init__(self, asked: list[Request], reasons: Mapping[int, str], budget: TokenBudget) -> None:
        self.rows, self.limit_tokens = len(reasons), budget.limit_tokens
        self.failed = sum(reason == "error" for reason in reasons.values())
        self.complete = sorted(reasons) == [request.position for request in asked] and not self.failed
        self.shortages = budget.out_of_memory_count


def _answered(model: LoadedModel, asked: list[Request], store: BudgetStore) -> _Session:
    from bench.generation import queue_of
    from tasks.core.generation.answering import remember_budget, starting_budget
    from tasks.core.generation.engines.inflight import InflightEngine
    from tasks.core.generation.ladder import generate_all
    from tasks.core.records import GenerationSettings

    budget = starting_budget(model, batch_size=len(asked), max_batch_tokens=FAR_TOO_MANY_TOKENS, store=store)
    engine = InflightEngine(model, GenerationSettings(max_new_tokens=asked[0].max_new_tokens))
    rows = generate_all(engine, queue_of(asked), budget, device=model.device)
    reasons = {row.position: row.finish_reason for row in rows}
    remember_budget(model, budget, store)
    return _Session(asked, reasons, budget)


def _told(session: _Session, asked: list[Request]) -> tuple[str, dict[str, Any]]:
    figures = {
        "rows": session.rows, "asked": len(asked), "error_rows": session.failed,
        "out_of_memory": session.shortages, "limit_tokens": session.limit_tokens,
    }  # fmt: skip
    seen = (
        f"{session.rows} of {len(asked)} rows, {session.failed} of them errors; memory ran out "
        f"{session.shortages} times, limit at the end {session.limit_tokens} tokens"
    )
    return seen, figures


def _hungry(bench: Bench) -> tuple[LoadedModel, list[Request]]:
    """A model whose cache is large, and rows that need 1.6 times what there is (all of it, in a rehearsal)."""
    from tasks.core.memory.device_memory import cache_bytes_per_token

    if bench.tiny:
        shape = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 16,
            "num_key_value_heads": 16, "head_dim": 256,
        }  # fmt: skip
        model = models.random_llama(bench, "float32", **shape)
        return model, _equally_long(27, 85, REHEARSED_ANSWER_TOKENS)
    layers = max(4, min(64, _free_bytes(bench) // TOKENS_THAT_FILL // (2 * 2 * 32 * 128)))
    shape = {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000,
    }  # fmt: skip
    model = models.random_llama(bench, "bfloat16", **shape)
    tokens = 1.6 * _free_bytes(bench) / cache_bytes_per_token(model.model)
    return model, _equally_long(
        int(tokens / (PROMPT_TOKENS + ANSWER_TOKENS)) + 1, PROMPT_TOKENS, ANSWER_TOKENS
    )


def _equally_long(count: int, tokens: int, answer_tokens: int) -> list[Request]:
    from tasks.core.generation.batching import Request

    return [
        Request(
            place, f"row-{place}", tuple(4 + (place + 7 * at) % 390 for at in range(tokens)), answer_tokens
        )
        for place in range(count)
    ]


def _free_bytes(bench: Bench) -> int:
    from tasks.core.memory.device_memory import free_bytes
    from tasks.core.models.placement import choose_device

    return free_bytes(choose_device(bench.device)) if bench.on_gpu else CPU_HEADROOM_BYTES


@contextmanager
def _little_memory(bench: Bench) -> Iterator[None]:
    """On the CPU, let this process take only a little more; a card's own size is the limit on a GPU."""
    if bench.on_gpu:
        yield
        return
    import psutil

    # What is freed is to leave the address space, whatever lies beside it in the heap; see mallopt(3).
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_M_MMAP_THRESHOLD, 1 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + CPU_HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


NEIGHBOUR = """
import sys, torch
held = torch.ones(int(sys.argv[2]), dtype=torch.uint8, device=sys.argv[1])
if held.is_cuda:
    torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def _neighbour(bench: Bench, count: int) -> Iterator[None]:
    """Let another process hold `count` bytes of the device's memory (a little on the CPU, for the rehearsal)."""
    held = count if bench.on_gpu else 2**20
    command = [sys.executable, "-c", NEIGHBOUR, bench.device, str(held)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the neighbour could not take its memory")
        yield
    finally:
        process.communicate("")


def _child_dies(bench: Bench) -> Iterator[Row]:
    """In a process of its own, as every run on a GPU is."""
    from bench.gpu_parts.dying import AbortsOnce, KilledOnce
    from tasks.core.config import load_config
    from tasks.core.generation.runners.isolation import ChildDiedError

    rows = 6 if bench.tiny else 60
    path = bench.folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"How many has dog {n}?"}) + "\n" for n in range(rows)))

    def inferencer(kind: type[Inferencer]) -> Inferencer:
        overrides = {
            "inferencer.model": models.small_model(bench), "inferencer.testing_data_id": str(path),
            "inferencer.max_new_tokens": 8, "inferencer.temperature": 0, "inferencer.device": bench.device,
            "inferencer.isolation": "process", "inferencer.run_name": kind.__name__,
            "pipeline.runs_dir": str(bench.folder / "runs"), "pipeline.models_dir": str(bench.folder / "models"),
        }  # fmt: skip
        return kind(load_config(None, overrides))

    manifest = inferencer(AbortsOnce).infer()
    deaths = sum(event.kind == "process_died" for event in manifest.memory_events)
    whole = manifest.row_count == rows and manifest.error_count == 0
    seen = f"{manifest.row_count} of {rows} rows, {manifest.error_count} errors, {deaths} death noted"
    yield bench.judged("child aborts", whole and deaths == 1, seen)
    try:
        inferencer(KilledOnce).infer()
        told = "nothing was told"
    except ChildDiedError as error:
        told = str(error).splitlines()[0]
    manifest = inferencer(KilledOnce).infer()
    whole = manifest.row_count == rows and manifest.error_count == 0
    seen = f"{told}; run again: {manifest.row_count} of {rows} rows, {manifest.error_count} errors"
    yield bench.judged("child killed, run again", whole and "SIGKILL" in told, seen)


def _training(bench: Bench) -> Iterator[Row]:
    """A batch far too large for what a neighbour leaves: the step is cut in pieces."""
    rows_at_once = 128 if bench.tiny else 256
    rows_path = models.training_rows(bench, "long-rows", rows_at_once, words=640 if bench.tiny else 200)
    settings: dict[str, Any] = {"device_train_batch_size": rows_at_once, "max_sequence_length": 700}
    if not bench.on_gpu:  # libraries are loaded before the process's address space is limited
        models.training(bench, "warm", models.training_rows(bench, "warm-rows", 4))
    taken = max(2**20, _free_bytes(bench) - LEFT_FOR_TRAINING_BYTES)
    with _neighbour(bench, taken), _little_memory(bench):
        trained = models.training(bench, "cut", rows_path, **settings)
    chosen = trained.manifest.settings
    at_once, pieces = chosen["rows_at_once"], chosen["pieces_in_step"]
    cut = at_once < rows_at_once and at_once * pieces == rows_at_once and trained.manifest.memory_events
    seen = f"{rows_at_once} rows did not fit; the step was cut in {pieces} pieces of {at_once}"
    yield bench.judged("training cuts its step", bool(cut), seen, {"rows_at_once": at_once, "pieces": pieces})


CHECKS = (
    Check("ladder", _ladder, 45, 120),
    Check("child dies", _child_dies, 50, 120),
    Check("training cuts its step", _training, 20, 80),
)
