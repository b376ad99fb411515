"""Part 1: in float32 an answer depends on nothing but the row; a training loses the same on a GPU as on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bench.checks.rows import Bench, Check, Figures, Row
from bench.gpu_parts import models

if TYPE_CHECKING:
    from tasks.core.generation.batching import Request
    from tasks.core.models.loading import LoadedModel

Answers = dict[int, tuple[int, ...]]
ENGINES = (("inflight", 64), ("generate", 16))
LARGEST_LOSS_DIFFERENCE = 1e-4


def _exact() -> None:
    """No shortened products: 10 bits of TF32 would make rows depend on their batch."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _small(bench: Bench) -> Iterator[Row]:
    _exact()
    model = models.load_small(bench, "float32")
    count, tokens = (6, 8) if bench.tiny else (24, 32)
    asked = models.chats(model, count, 1 if bench.tiny else 16, tokens)
    yield from _engines(bench, models.small_name(bench), model, asked)


def _random(bench: Bench) -> Iterator[Row]:
    _exact()
    model = models.random_llama(bench, "float32")
    count, tokens = (6, 8) if bench.tiny else (24, 32)
    yield from _engines(
        bench, "random Llama", model, models.requests(count, 40 if bench.tiny else 400, tokens)
    )


def _prefix_and_sampling(bench: Bench) -> Iterator[Row]:
    from bench.generation import one_at_a_time, through_engine
    from tasks.core.records import GenerationSettings

    _exact()
    model = models.load_small(bench, "float32")
    count, tokens = (6, 6) if bench.tiny else (16, 24)
    asked = models.requests(count, 30 if bench.tiny else 200, tokens, shared=140)

    def shared() -> Row:
        alone, flown = one_at_a_time(model, asked), through_engine("inflight", 64)(model, asked)
        return _compared(bench, "in flight, 140 tokens in common", model, asked, alone, flown)

    def sampled() -> Row:
        settings = GenerationSettings(max_new_tokens=tokens, do_sample=True, temperature=0.8, top_p=0.95)
        three, all_at_once = (_sampled(model, asked, settings, rows) for rows in (3, 64))
        name = "sampled, 3 at once = all at once"
        return _compared(bench, name, model, asked, three, all_at_once)

    yield bench.tried("in flight, 140 tokens in common", shared)
    yield bench.tried("sampled, 3 at once = all at once", sampled)


def _sampled(model: LoadedModel, asked: list[Request], settings: object, rows: int) -> Answers:
    from bench.generation import queue_of
    from tasks.core.generation.engines.inflight import InflightEngine
    from tasks.core.memory.budget import TokenBudget

    engine = InflightEngine(model, settings)  # type: ignore[arg-type]
    answered = engine.generate(queue_of(asked), TokenBudget(10**9, rows))
    return {row.position: row.token_ids for row in answered}


def _engines(bench: Bench, name: str, model: LoadedModel, asked: list[Request]) -> Iterator[Row]:
    """Each engine against one row at a time."""
    from bench.generation import one_at_a_time, through_engine

    alone = one_at_a_time(model, asked)

    def against_alone(engine: str, rows: int) -> Callable[[], Row]:
        return lambda: _compared(
            bench,
            f"{name}: {engine} = alone",
            model,
            asked,
            alone,
            through_engine(engine, rows)(model, asked),
        )

    for engine, rows in ENGINES:
        yield bench.tried(f"{name}: {engine} = alone", against_alone(engine, rows))


def _compared(
    bench: Bench, check: str, model: LoadedModel, asked: list[Request], alone: Answers, other: Answers
) -> Row:
    """Pass when every row has the same answer; where not, say how near a tie the first differing token was."""
    differing = [request for request in asked if alone[request.position] != other.get(request.position)]
    same = len(asked) - len(differing)
    seen = f"{same} of {len(asked)} rows"
    figures: Figures = {"same_rows": same, "rows": len(asked)}
    if differing:
        gaps = [_gap(model, request, alone, other) for request in differing[:8]]
        seen += f"; largest gap of logits where they part: {max(gaps):.2g}"
        figures["largest_gap"] = max(gaps)
    return bench.judged(check, not differing, seen, figures)


def _gap(model: LoadedModel, request: Request, alone: Answers, other: Answers) -> float:
    """How far apart the model, given one row, sees the two tokens that came first where two answers part."""
    import torch

    mine, theirs = alone[request.position], other.get(request.position, ())
    place = next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if place is None:
        return float("inf")  # one ended where the other went on
    ids = torch.tensor([[*request.token_ids, *mine[:place]]], device=model.device)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return float((logits[mine[place]] - logits[theirs[place]]).abs())


def _training(bench: Bench) -> Iterator[Row]:
    """All weights learn, from the same start: an adapter's first weights would be drawn on each device anew."""
    _exact()
    steps = 3 if bench.tiny else 5
    rows_path = models.training_rows(bench, "same-steps", 4 * steps)
    settings: dict[str, Any] = {"full_finetuning": True, "dtype": "float32", "learning_rate": 1e-4}
    on_cpu = models.losses(models.training(bench, "on-cpu", rows_path, **settings, device="cpu"))
    there = models.losses(models.training(bench, "on-device", rows_path, **settings))
    difference = max(abs(one - other) / abs(one) for one, other in zip(on_cpu, there, strict=True))
    yield bench.judged_on_gpu(
        "training loss = CPU's",
        difference <= LARGEST_LOSS_DIFFERENCE and len(there) == steps,
        f"{len(there)} steps, largest relative difference {difference:.1e}",
        {"steps": len(there), "largest_difference": difference, "last_loss": there[-1]},
    )


CHECKS = (
    Check("SmolLM2: engines", _small, 40, 100),
    Check("random Llama: engines", _random, 25, 80),
    Check("prefix and sampling", _prefix_and_sampling, 15, 60),
    Check("training loss", _training, 20, 80),
)
