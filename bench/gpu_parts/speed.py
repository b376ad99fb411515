"""Part 4: how fast, beside others and beside what the card itself reaches in a large product and a large copy."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.checks.rows import Bench, Check, Figures, Row
from bench.gpu_parts import models

if TYPE_CHECKING:
    import torch

    from tasks.core.generation.batching import Request
    from tasks.core.models.loading import LoadedModel

METHODS = (("inflight", 256), ("inflight", 128), ("inflight", 64), ("generate", 64), ("generate", 256))
# Operations of a step by what they are for; the first that fits.
KINDS = (
    ("linear layers", ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::", "aten::mkldnn_linear")),
    ("attention products", ("aten::bmm", "aten::baddbmm")),
    ("softmax", ("aten::_softmax",)),
    ("writing to slots", ("aten::index_put", "aten::_index_put")),
    ("copies", ("aten::copy_", "aten::cat", "aten::clone", "aten::_to_copy", "aten::fill_", "aten::zero_")),
    ("waiting for the device", ("cudaStreamSynchronize", "cudaDeviceSynchronize")),
)  # fmt: skip
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def _seconds(bench: Bench, function: Callable[[], object], repeats: int, warm: int = 3) -> float:
    """Median seconds of one call, the device's work included."""
    for _ in range(warm):
        function()
    _wait(bench)
    measured = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        _wait(bench)
        measured.append(time.perf_counter() - started)
    return statistics.median(measured)


def _wait(bench: Bench) -> None:
    if bench.on_gpu:
        import torch

        torch.cuda.synchronize()


def _peaks(bench: Bench) -> Iterator[Row]:
    """What the card reaches; other checks are told as shares of it."""
    reached = _measured_peaks(bench)
    (bench.folder / "peaks.json").write_text(json.dumps(reached))
    seen = (
        f"product {reached['bfloat16_tflops']:.1f} TFLOP/s in bfloat16, {reached['float32_tflops']:.1f} in float32; "
        f"copy {reached['copy_gb_per_second']:.0f} GB/s, read and written"
    )
    yield Row("the card's own", "measured", seen, dict(reached))


def _peak(bench: Bench, name: str) -> float:
    path = bench.folder / "peaks.json"
    if not path.exists():  # the process that measured them did not come to its end
        path.write_text(json.dumps(_measured_peaks(bench)))
    return float(json.loads(path.read_text())[name])


def _measured_peaks(bench: Bench) -> dict[str, float]:
    import torch

    reached = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        size = 128 if bench.tiny else size
        one, other = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        seconds = _seconds(bench, partial(torch.matmul, one, other), 10)
        reached[f"{str(dtype).removeprefix('torch.')}_tflops"] = 2 * size**3 / seconds / 1e12
    source = torch.randn((2**20 if bench.tiny else 2**31) // 4, device=bench.device)
    target = torch.empty_like(source)
    seconds = _seconds(bench, lambda: target.copy_(source), 10)
    reached["copy_gb_per_second"] = 2 * source.nbytes / seconds / 1e9
    return reached


def _generation(bench: Bench) -> Iterator[Row]:
    """Tokens a second of each engine: 256 prompts of 50 to 500 tokens, 64 new tokens each."""
    model = models.random_llama(bench, "bfloat16")
    asked = models.requests(6, 40, 4) if bench.tiny else models.requests(256, 500, 64)
    for engine, rows in METHODS:
        name = f"random Llama, {engine}, {rows} rows"
        yield bench.tried(name, partial(_rate, bench, name, model, asked, engine, rows))


def _small_generation(bench: Bench) -> Iterator[Row]:
    model = models.load_small(bench, "bfloat16")
    asked = models.chats(model, *((8, 1, 4) if bench.tiny else (256, 22, 64)))
    for engine, rows in METHODS[:1] if bench.tiny else (METHODS[0], METHODS[3]):
        name = f"{models.small_name(bench)}, {engine}, {rows} rows"
        yield bench.tried(name, partial(_rate, bench, name, model, asked, engine, rows))


def _rate(
    bench: Bench, name: str, model: LoadedModel, asked: Sequence[Request], engine: str, rows: int
) -> Row:
    from bench.generation import through_engine

    run = through_engine(engine, rows)
    run(model, list(asked[:2]))
    _reset_peak(bench)
    started = time.perf_counter()
    answers = run(model, list(asked))
    seconds = time.perf_counter() - started
    tokens = sum(map(len, answers.values()))
    peak = _peak_mib(bench)
    figures: Figures = {"tokens_per_second": tokens / seconds, "tokens": tokens, "peak_mib": peak}
    return Row(name, "measured", f"{tokens / seconds:.0f} tokens/s, peak {peak:.0f} MiB", figures, seconds)


class _Flight:
    """Rows that step together without an engine around them, so that a step can be timed and profiled."""

    def __init__(self, model: LoadedModel, asked: Sequence[Request], steps: int) -> None:
        from tasks.core.generation.engines.slots import Row as Flying
        from tasks.core.generation.engines.slots import SlotCache

        self.model = model
        self.rows = [Flying(request, None, 0.0) for request in asked]
        self.cache = SlotCache(max_width=max(len(row.request.token_ids) for row in self.rows) + steps)

    def prefill(self, step_tokens: int) -> int:
        """Compute all prompts, about `step_tokens` a step; returns how many tokens these are."""
        total = 0
        waiting = list(self.rows)
        while waiting:
            step, tokens = self._plan(), 0
            while waiting and (not tokens or tokens + waiting[0].missing <= step_tokens):
                row = waiting.pop(0)
                self.cache.add(row, row.missing)
                tokens += step.prefill(row, row.missing)
            self._run(step)
            total += tokens
        return total

    def decode(self) -> None:
        """Compute one token of every row."""
        for row in self.rows:
            self.cache.make_room(row, row.stored + 1)
        step = self._plan()
        for pool in self.cache.active():
            step.decode(pool)
        self._run(step)

    def _plan(self) -> Any:
        from tasks.core.generation.engines.step import StepPlan

        return StepPlan(self.model.device)

    def _run(self, step: Any) -> None:
        from tasks.core.generation.engines.step import forward

        logits = forward(self.model.model, self.model.device, step)
        for row, token in zip(step.choosing, logits.argmax(dim=-1).tolist(), strict=True):
            row.new_tokens.append(token)


def _steps(bench: Bench) -> Iterator[Row]:
    """Prefill and decode steps of the in-flight engine alone, as shares of what the card reaches; a profile."""
    from tasks.core.generation.engines.fused_layers import fused_layers
    from tasks.core.generation.engines.packed_attention import packed_attention

    model = models.random_llama(bench, "bfloat16")
    asked = models.requests(6, 40, 32) if bench.tiny else models.requests(256, 1000, 32)
    with ExitStack() as inside:
        inside.enter_context(packed_attention(model.model))
        inside.enter_context(fused_layers(model.model))
        _Flight(model, asked[:2], 32).prefill(8192)  # warms up
        _wait(bench)
        flight = _Flight(model, asked, 32)
        started = time.perf_counter()
        tokens = flight.prefill(8192)
        _wait(bench)
        yield _prefill_row(bench, model, tokens, time.perf_counter() - started)
        seconds = _seconds(bench, flight.decode, 8)
        yield _decode_row(bench, flight, seconds)
        yield bench.tried("decode step by part", lambda: _profile(bench, flight, seconds))


def _prefill_row(bench: Bench, model: LoadedModel, tokens: int, seconds: float) -> Row:
    embedding = model.model.get_input_embeddings().weight.numel()
    operations = 2 * (models.weight_count(model) - embedding) * tokens
    share = operations / seconds / 1e12 / _peak(bench, "bfloat16_tflops")
    seen = f"{tokens / seconds:.0f} tokens/s, {share:.1%} of the product's rate"
    return Row(
        "prefill", "measured", seen, {"tokens_per_second": tokens / seconds, "share_of_product": share}
    )


def _decode_row(bench: Bench, flight: _Flight, seconds: float) -> Row:
    """The fewest bytes a step must read: all weights once, and each row's own keys and values."""
    from tasks.core.memory.device_memory import cache_bytes_per_token

    per_token = cache_bytes_per_token(flight.model.model)
    weights = sum(parameter.nbytes for parameter in flight.model.model.parameters())
    stored = sum(row.stored for row in flight.rows) * per_token
    slots = sum(pool.width * len(pool.rows) for pool in flight.cache.pools) * per_token
    needed = weights + stored
    share = needed / seconds / 1e9 / _peak(bench, "copy_gb_per_second")
    pools = sum(bool(pool.rows) for pool in flight.cache.pools)
    seen = (
        f"{1000 * seconds:.1f} ms for {len(flight.rows)} rows, {len(flight.rows) / seconds:.0f} tokens/s; the least "
        f"to read is {needed / 2**30:.2f} GiB, {share:.1%} of the copy's rate; slots hold {slots / stored:.2f} times "
        f"what rows have, in {pools} pools"
    )
    figures: Figures = {
        "milliseconds": 1000 * seconds, "share_of_copy": share, "slots_to_stored": slots / stored, "pools": pools,
        "rows": len(flight.rows),
    }  # fmt: skip
    return Row("decode step", "measured", seen, figures)


def _profile(bench: Bench, flight: _Flight, step_seconds: float) -> Row:
    """Where a step's time goes on the device, how busy that is, and how many kernels are started."""
    from torch.profiler import ProfilerActivity, profile

    steps = 4
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(steps):
            flight.decode()
        _wait(bench)
    spent: Counter[str] = Counter()
    launches = 0
    for entry in profiled.key_averages():
        launches += entry.count if entry.key in LAUNCHES else 0
        if not entry.key.startswith(("aten::", "mkldnn::")):
            continue  # kernels by their own names, which their operations have already
        used = entry.self_device_time_total if bench.on_gpu else entry.self_cpu_time_total
        kind = next((kind for kind, names in KINDS if entry.key.startswith(names)), "other operations")
        spent[kind] += used / steps / 1000
    busy = sum(spent.values()) / 1000 / step_seconds
    parts = ", ".join(f"{kind} {milliseconds:.2f}" for kind, milliseconds in spent.most_common())
    seen = f"milliseconds: {parts}; busy {busy:.0%} of the step; {launches // steps} kernels started"
    figures: Figures = {
        **{f"{kind}_milliseconds": value for kind, value in spent.items()}, "busy_share": busy,
        "kernels": launches // steps,
    }  # fmt: skip
    return Row("decode step by part", "measured", seen, figures)


def _attention(bench: Bench) -> Iterator[Row]:
    """One layer's decode attention: ours over whole slots, and kernels of torch that read less or do it at once."""
    import torch

    rows, width = (4, 64) if bench.tiny else (256, 1024)
    heads, repeats, size = 8, 4, 64
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(width // 16, width, (rows,), generator=generator).to(bench.device)
    query = torch.randn(rows, heads * repeats, size, device=bench.device).to(torch.bfloat16)
    keys, values = (
        torch.randn(rows, heads, width, size, device=bench.device).to(torch.bfloat16) for _ in range(2)
    )
    wanted = _ours(query, keys, values, lengths)
    stored = 2 * int(lengths.sum()) * heads * size * 2
    for name, function in (
        ("ours, whole slots", _ours), ("scaled_dot_product_attention, mask", _fused), ("varlen_attn", _varlen),
    ):  # fmt: skip
        arguments: tuple[torch.Tensor, ...] = (query, keys, values, lengths)
        if function is _varlen:  # its layout is made beforehand, as a cache of that layout would have it
            arguments = (query, *(part.transpose(1, 2).contiguous() for part in (keys, values)), lengths)
        yield _kernel(bench, f"decode attention: {name}", function, arguments, wanted, stored)


def _kernel(
    bench: Bench, name: str, function: Callable[..., torch.Tensor], arguments: Any, wanted: Any, stored: int
) -> Row:
    try:
        difference = float((function(*arguments) - wanted).float().norm() / wanted.float().norm())
        seconds = _seconds(bench, lambda: function(*arguments), 20)
    except Exception as error:  # this torch, card or format does not have it
        return Row(name, "skipped", f"not here: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    share = stored / seconds / 1e9 / _peak(bench, "copy_gb_per_second")
    seen = f"{1e6 * seconds:.0f} microseconds, {share:.1%} of the copy's rate; differs by {difference:.1e}"
    figures: Figures = {
        "microseconds": 1e6 * seconds,
        "share_of_copy": share,
        "relative_difference": difference,
    }
    return Row(name, "measured", seen, figures)


def _ours(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    import torch

    rows, heads, width, size = keys.shape
    hidden = torch.arange(width, device=keys.device) >= lengths[:, None]
    mask = torch.zeros(rows, width, dtype=keys.dtype, device=keys.device).masked_fill_(hidden, -float("inf"))
    mask = mask.repeat_interleave(heads, dim=0).unsqueeze(1)
    flat = keys.view(rows * heads, width, size)
    scores = torch.baddbmm(mask, query.view(rows * heads, -1, size), flat.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), values.view(rows * heads, width, size)).view(query.shape)


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    import torch

    seen = (torch.arange(keys.shape[2], device=keys.device) < lengths[:, None])[:, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query.unsqueeze(2), keys, values, attn_mask=seen, enable_gqa=True).squeeze(2)


def _varlen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Keys and values are [rows, width, heads, size]: each slot is one page."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    rows, width = keys.shape[:2]
    starts = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
    return varlen_attn(
        query, keys.flatten(0, 1), values.flatten(0, 1), starts, starts * width, 1, width,
        enable_gqa=True, seqused_k=lengths.to(torch.int32),
    )  # type: ignore[return-value]  # fmt: skip


def _training(bench: Bench) -> Iterator[Row]:
    """LoRA in bfloat16, rows of about 250 tokens, with and without gradient checkpointing."""
    steps, rows = (3, 2) if bench.tiny else (60, 16)
    rows_path = models.training_rows(bench, "speed-rows", steps * rows, words=20 if bench.tiny else 230)
    name = models.small_name(bench)
    for saved in (False, True):
        check = f"{name}: training{', gradient checkpointing' if saved else ''}"
        yield bench.tried(
            check,
            partial(
                _training_rate,
                bench,
                check,
                rows_path,
                rows,
                f"speed-{saved}",
                use_gradient_checkpointing=saved,
            ),
        )


def _big_training(bench: Bench) -> Iterator[Row]:
    """The same with the random Llama, which must lie on disk for it."""
    steps, rows = (3, 2) if bench.tiny else (24, 16)
    rows_path = models.training_rows(bench, "big-rows", steps * rows, words=20 if bench.tiny else 230)
    folder = bench.folder / "big-model"
    made = models.random_llama(bench, "bfloat16")
    weights = models.weight_count(made)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    del made
    models.forget(bench)
    for saved in (False, True):
        check = f"random Llama: training{', gradient checkpointing' if saved else ''}"
        yield bench.tried(
            check,
            partial(
                _training_rate,
                bench, check, rows_path, rows, f"big-{saved}", weights=weights, base_model_id=str(folder),
                use_gradient_checkpointing=saved,
            ),
        )  # fmt: skip


def _training_rate(
    bench: Bench, check: str, rows_path: Any, rows: int, run: str, weights: int | None = None, **settings: Any
) -> Row:
    """Tokens a second between the first and the last report of progress, so that the first steps warm up."""
    seen_at: list[tuple[float, int]] = []
    _reset_peak(bench)
    trained = models.training(
        bench, run, rows_path, lambda progress: seen_at.append((time.perf_counter(), progress.step)),
        dtype="bfloat16", device_train_batch_size=rows, **settings,
    )  # fmt: skip
    manifest = trained.manifest
    (began, first), (ended, last) = seen_at[0], seen_at[-1]
    whole = last == first
    tokens = manifest.trained_tokens if whole else manifest.trained_tokens * (last - first) / manifest.steps
    rate = tokens / (manifest.seconds if whole else ended - began)
    peak = _peak_mib(bench)
    seen, figures = f"{rate:.0f} tokens/s, peak {peak:.0f} MiB", {"tokens_per_second": rate, "peak_mib": peak}
    if weights is not None:  # forward, and backward through frozen weights: 2 operations each
        share = 4 * weights * rate / 1e12 / _peak(bench, "bfloat16_tflops")
        seen, figures["share_of_product"] = f"{seen}, {share:.1%} of the product's rate", share
    models.forget(bench)
    return Row(check, "measured", seen, figures)  # type: ignore[arg-type]


def _reset_peak(bench: Bench) -> None:
    if bench.on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_mib(bench: Bench) -> float:
    from tasks.core.memory.device_memory import peak_bytes

    return peak_bytes(bench.device) / 2**20


CHECKS = (
    Check("the card's own", _peaks, 12, 40),
    Check("generation", _generation, 45, 120),
    Check("steps", _steps, 15, 60),
    Check("decode attention", _attention, 8, 40),
    Check("SmolLM2", _small_generation, 15, 60),
    Check("training, SmolLM2", _training, 20, 60),
    Check("training, random Llama", _big_training, 30, 80),
)
