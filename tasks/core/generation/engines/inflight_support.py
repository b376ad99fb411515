"""Whether in-flight batching answers rightly with a model: by its settings, then by trying it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.core.errors import first_line
from tasks.core.generation.batching import Request
from tasks.core.generation.engines.probe_memory import is_remembered, probe_key, remember
from tasks.core.memory.device_memory import is_out_of_memory
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    import torch

    from tasks.core.models.loading import LoadedModel

# Largest relative difference between packed and plain logits that rounding explains, by bytes of the dtype.
TOLERANCE = {4: 1e-3, 2: 5e-2}
PROBE_LENGTHS = (5, 19, 11)
PROBE_DECODED = 2
PROBE_TRIALS = 3


def why_unsupported(model: LoadedModel, settings: GenerationSettings) -> str | None:
    """Return why this model or a setting needs `generate`, or None.

    Whether the architecture is covered is not guessed from its name: three short prompts are packed, and the
    logits must equal those of the model's own attention. A model of a shape that did so before is not tried again,
    see `probe_key`.
    """
    if settings.num_beams > 1:
        return "beam search"
    if model.model.config.is_encoder_decoder:
        return "an encoder-decoder model"
    layer_types = getattr(model.model.config.get_text_config(), "layer_types", None) or []
    if "chunked_attention" in layer_types:
        return "chunked attention"
    key = probe_key(model)
    if is_remembered(key) and _probe(model) is not None:  # weights that give no numbers are told of each time
        return None
    reason = _why_wrong(model, layer_types)
    if reason is None:
        remember(key)
    return reason


def _why_wrong(model: LoadedModel, layer_types: Sequence[str]) -> str | None:
    """What packed attention does wrong with this model, found by trying it; None when it gives the same."""
    windows: set[int | None] = set()
    try:
        difference = _largest_difference(model, windows)
    except (
        NotImplementedError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
    ) as exc:
        if is_out_of_memory(exc):
            raise
        reason = f"{type(exc).__name__}: {first_line(exc, 200)}"
        return f"{type(model.model).__name__} does not run with packed attention ({reason})"
    bytes_per_value = 4 if model.identity.dtype == "float32" and model.identity.quantization == "none" else 2
    if difference is None:
        return f"{type(model.model).__name__} gives NaN or infinity, with which packed attention cannot be checked"
    if math.isnan(difference):
        return f"{type(model.model).__name__} gives NaN with packed attention where its own attention gives numbers"
    if not difference <= TOLERANCE[bytes_per_value]:
        return (
            f"{type(model.model).__name__} gives other logits with packed attention (off by {difference:.1%})"
        )
    window = _sliding_window(model, layer_types)
    if window is not None and window not in windows:  # the probe is too short to feel a wide one
        return (
            f"{type(model.model).__name__} does not tell its attention the sliding window of {window} tokens"
        )
    return None


def _sliding_window(model: LoadedModel, layer_types: Sequence[str]) -> int | None:
    """The window that some layer of the model uses, in tokens."""
    config = model.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    used = "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)
    return int(window) if window and used else None


def _largest_difference(model: LoadedModel, windows: set[int | None]) -> float | None:
    """Relative difference of the logits that packed steps and a plain forward pass give, largest over rows.

    NaN when only packed logits are no numbers, None when those of the plain pass are not either. Adds the sliding
    windows that the layers asked for to `windows`.
    """
    probe = _probe(model)
    if probe is None:
        return None
    texts, lengths, plain = probe
    packed = _packed_logits(model, texts, lengths, windows)
    return max(
        (_difference(mine, theirs) for mine, theirs in zip(packed, plain, strict=True)),
        key=lambda difference: math.inf if math.isnan(difference) else difference,
    )


def _probe(model: LoadedModel) -> tuple[list[list[int]], list[int], list[torch.Tensor]] | None:
    """Token ids to try, their prompts' lengths, and the last logits of each that the model's own attention gives.

    Other token ids are tried where these are no numbers, since the weights of some token may be broken; None where no
    trial gives numbers.
    """
    import torch

    vocabulary = model.model.config.get_text_config().vocab_size
    window = getattr(model.model.config.get_text_config(), "sliding_window", None) or 0
    lengths = [length + (window if window <= 256 else 0) for length in PROBE_LENGTHS]
    for seed in range(PROBE_TRIALS):
        generator = torch.Generator().manual_seed(seed)
        texts = [
            torch.randint(0, vocabulary, (length + PROBE_DECODED,), generator=generator).tolist()
            for length in lengths
        ]
        plain = [_plain_logits(model, text, PROBE_DECODED + 1) for text in texts]
        if all(bool(logits.amax(dim=-1).isfinite().all()) for logits in plain):
            return texts, lengths, plain
    return None


def _packed_logits(
    model: LoadedModel, texts: list[list[int]], lengths: list[int], windows: set[int | None]
) -> list[torch.Tensor]:
    """The same logits from packed steps; adds the sliding windows that the layers asked for to `windows`."""
    import torch

    from tasks.core.generation.engines.fused_layers import fused_layers
    from tasks.core.generation.engines.packed_attention import packed_attention
    from tasks.core.generation.engines.slots import Row, SlotCache
    from tasks.core.generation.engines.step import StepPlan, forward

    packed: list[list[torch.Tensor]] = [[] for _ in texts]
    rows = [
        Row(Request(place, str(place), tuple(text[:length]), PROBE_DECODED), None, time.perf_counter())
        for place, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    cache = SlotCache(max_width=max(map(len, texts)))
    with packed_attention(model.model), fused_layers(model.model):
        for turn in range(PROBE_DECODED + 1):
            step = StepPlan(model.device)
            if turn == 0:
                for row in rows:
                    cache.add(row, len(row.request.token_ids) + PROBE_DECODED)
                    step.prefill(row, row.missing)
            for pool in cache.active() if turn else ():
                step.decode(pool)
            logits = forward(model.model, model.device, step, windows)
            for row, scores in zip(step.choosing, logits, strict=True):
                packed[row.request.position].append(scores.float())
                if turn < PROBE_DECODED:
                    place = row.request.position
                    row.new_tokens.append(texts[place][lengths[place] + turn])
    return [torch.stack(logits) for logits in packed]


def _plain_logits(model: LoadedModel, text: list[int], last: int) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        input_ids = torch.tensor([text], device=model.device)
        logits: torch.Tensor = model.model(input_ids=input_ids, use_cache=False).logits
    return logits[0, -last:].float()


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    numbers = theirs.isfinite() | (mine != theirs)  # both rule out tokens that the model makes impossible
    mine, theirs = mine[numbers], theirs[numbers]
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-9))
