"""What a step takes besides the cache is set aside before the cache's limit is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.core.generation.answering import CACHE_SHARE, DEFAULT_MAX_ROWS_CPU, starting_budget
from tasks.core.memory.activations import activation_bytes
from tasks.core.memory.device_memory import cache_bytes_per_token
from tasks.core.models.loading import LoadedModel
from tasks.core.records import ModelIdentity
from tests.conftest import build_tiny_model


def loaded(tokenizer: Any, **shape: int) -> LoadedModel:
    model = build_tiny_model(tokenizer, **shape)
    identity = ModelIdentity(
        model_id="m", weights_sha256="0" * 64, dtype="float32", chat_template_sha256="", vocab_size=9
    )
    return LoadedModel(model, tokenizer, identity, "cpu")


@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 4096}, {"hidden_size": 256}])
def test_the_estimate_covers_what_one_layer_of_a_real_step_holds(
    tiny_tokenizer: Any, shape: dict[str, int]
) -> None:
    model, tokens = loaded(tiny_tokenizer, **shape).model, 512
    held: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        held.append(output.numel() * output.element_size())

    layer = model.model.layers[0]
    for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
        linear.register_forward_hook(count)
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=False)
    estimate = activation_bytes(model, "cpu", tokens=tokens, rows=0)
    assert sum(held) / 2 < estimate < 4 * sum(held)


def test_a_model_with_wide_layers_and_many_words_leaves_less_for_the_cache(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.core.generation.answering.free_bytes", lambda device: 2**30)
    narrow, wide = loaded(tiny_tokenizer), loaded(tiny_tokenizer, intermediate_size=16_384)
    limits = [
        starting_budget(model, batch_size=None, max_batch_tokens=None).limit_tokens
        for model in (narrow, wide)
    ]
    per_token = cache_bytes_per_token(narrow.model)
    assert limits[1] < limits[0] < 2**30 * CACHE_SHARE / per_token
    many_words = activation_bytes(narrow.model, "cpu", tokens=0, rows=DEFAULT_MAX_ROWS_CPU)
    assert many_words == DEFAULT_MAX_ROWS_CPU * narrow.model.config.vocab_size * 12
