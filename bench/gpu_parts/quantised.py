"""Part 3: 4 and 8 bits, QLoRA and merged answers, bfloat16 and float16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.checks.rows import Bench, Check, Figures, Row
from bench.gpu_parts import models

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel

BITS: dict[str, dict[str, bool]] = {"4 bits": {"load_in_4bit": True}, "8 bits": {"load_in_8bit": True}}
# Relative difference of logits: a merged adapter is rounded once more, in float32.
LARGEST_MERGE_DIFFERENCE = 1e-3


def _answers(bench: Bench, name: str, dtype: str, **settings: Any) -> Row:
    """Answer through two engines; logits must be numbers, and packed steps give those of a plain pass."""
    import torch

    from bench.generation import through_engine
    from tasks.core.generation.engines.inflight_support import why_unsupported
    from tasks.core.records import GenerationSettings

    model = models.load_small(bench, dtype, **settings)
    count, tokens = (4, 4) if bench.tiny else (32, 32)
    asked = models.chats(model, count, 1 if bench.tiny else 8, tokens)
    flown = through_engine("inflight", 64)(model, asked)
    sorted_batches = through_engine("generate", 16)(model, asked)
    same = sum(flown[place] == sorted_batches[place] for place in flown)
    with torch.inference_mode():
        ids = torch.tensor([asked[0].token_ids], device=model.device)
        finite = bool(torch.isfinite(model.model(input_ids=ids).logits).all())
    reason = why_unsupported(model, GenerationSettings(max_new_tokens=4))
    megabytes = _weights_mib(model)
    seen = (
        f"{len(flown)} of {count} rows in flight, {same} as with generate; weights {megabytes:.0f} MiB; "
        f"logits {'finite' if finite else 'NOT finite'}; in flight {reason or 'agrees with a plain pass'}"
    )
    figures: Figures = {"rows": len(flown), "same_rows": same, "weights_mib": megabytes}
    return bench.judged_on_gpu(name, finite and reason is None and len(flown) == count, seen, figures)


def _weights_mib(model: LoadedModel) -> float:
    return float(model.model.get_memory_footprint()) / 2**20


def _quantised_answers(bench: Bench) -> Iterator[Row]:
    for name, settings in BITS.items():
        yield bench.tried(name, partial(_answers, bench, name, "bfloat16", **settings))
        models.forget(bench)


def _formats(bench: Bench) -> Iterator[Row]:
    for dtype in ("bfloat16", "float16"):
        name = f"{dtype}: answers"
        yield bench.tried(name, partial(_answers, bench, name, dtype))
        models.forget(bench)
        name = f"{dtype}: training"
        yield bench.tried(name, partial(_trains, bench, name, dtype=dtype))


def _trains(bench: Bench, name: str, **settings: Any) -> Row:
    steps = 4 if bench.tiny else 16
    rows_path = models.training_rows(bench, "few-rows", 4 * steps)
    trained = models.training(bench, name.replace(": ", "-").replace(" ", "-"), rows_path, **settings)
    losses, compute = models.losses(trained), trained.manifest.settings["compute_dtype"]
    wanted = settings.get("dtype", compute)
    ok = (
        all(map(math.isfinite, losses)) and losses[-1] < losses[0] and (compute == wanted or not bench.on_gpu)
    )
    seen = f"computed in {compute}; loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    return bench.judged_on_gpu(name, ok, seen, {"first_loss": losses[0], "last_loss": losses[-1]})


def _qlora(bench: Bench) -> Iterator[Row]:
    """Train beside 4 bits; answer beside 4 bits; put the adapter into full weights and answer from these."""
    from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer

    name = "QLoRA: training"
    yield bench.tried(name, lambda: _trains(bench, name, load_in_4bit=True, dtype="bfloat16"))
    folder = str(bench.folder / "models" / "QLoRA-training")

    def beside_4_bits() -> Row:
        spec = ModelSpec(folder, dtype="bfloat16", device=bench.device, load_in_4bit=True)
        answered = _count_answers(bench, load_model_and_tokenizer(spec))
        return bench.judged_on_gpu("QLoRA: answers beside 4 bits", answered > 0, f"{answered} rows answered")

    yield bench.tried("QLoRA: answers beside 4 bits", beside_4_bits)
    models.forget(bench)
    yield bench.tried("QLoRA: merged", lambda: _merged(bench, folder))


def _merged(bench: Bench, folder: str) -> Row:
    """Compare the logits of merged weights with those of the adapter beside its base, both in float32."""
    import torch
    from peft import PeftModel

    from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer

    base = models.load_small(bench, "float32")
    asked = models.chats(base, 1, 2, 4)
    ids = torch.tensor([asked[0].token_ids], device=base.device)
    with torch.inference_mode():
        beside = PeftModel.from_pretrained(base.model, folder)(input_ids=ids, use_cache=False).logits
        merged = load_model_and_tokenizer(ModelSpec(folder, dtype="float32", device=bench.device))
        difference = (merged.model(input_ids=ids, use_cache=False).logits - beside).norm() / beside.norm()
    answered = _count_answers(bench, merged)
    seen = (
        f"logits differ by {float(difference):.1e} from the adapter beside its base; {answered} rows answered"
    )
    ok = float(difference) <= LARGEST_MERGE_DIFFERENCE and answered > 0
    return bench.judged_on_gpu("QLoRA: merged", ok, seen, {"relative_difference": float(difference)})


def _count_answers(bench: Bench, model: LoadedModel) -> int:
    from bench.generation import through_engine

    asked = models.chats(model, 4 if bench.tiny else 16, 2, 8)
    return len([ids for ids in through_engine("inflight", 16)(model, asked).values() if ids])


CHECKS = (
    Check("4 and 8 bits", _quantised_answers, 30, 90),
    Check("QLoRA", _qlora, 30, 90),
    Check("bfloat16 and float16", _formats, 25, 80),
)
