"""Prepared layers give the values of the model's own, follow its weights, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.core.generation.engines import fused_layers as module
from tasks.core.generation.engines.fused_layers import fused_layers
from tasks.core.memory.processor import prepares_bfloat16
from tests.generation.engines.test_engines import COVERED, build


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=tokens).logits
    return result


def replaced(model: Any) -> list[str]:
    return [name for name, part in model.named_modules() if "forward" in vars(part)]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(4, 34).view(2, 15)


@pytest.mark.parametrize("architecture", COVERED)
def test_logits_are_those_of_the_models_own_layers(architecture: str, tokens: torch.Tensor) -> None:
    model = build(architecture, 64)
    before = logits(model, tokens)
    with fused_layers(model):
        assert replaced(model) or architecture == "gpt2"  # whose layers are of another kind
        torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-4)
    assert replaced(model) == []
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_norms_and_gated_mlps_are_all_prepared_where_the_processor_can(
    dtype: torch.dtype, tokens: torch.Tensor
) -> None:
    model = build("llama", 64).to(dtype)
    before = logits(model, tokens).float()
    with fused_layers(model):
        names = {name.rsplit(".", 1)[-1] for name in replaced(model)}
        after = logits(model, tokens).float()
    if dtype == torch.float32 or prepares_bfloat16():
        assert names >= {"q_proj", "down_proj", "lm_head", "mlp", "input_layernorm", "norm"}
        assert (after - before).norm() < 0.02 * before.norm()
    else:
        assert names == set()
        assert torch.equal(after, before)


def test_a_norm_with_another_formula_keeps_its_own_code() -> None:
    model = build("gemma", 64)  # multiplies by 1 + weight
    with fused_layers(model):
        assert not any("norm" in name for name in replaced(model))
        assert any("q_proj" in name for name in replaced(model))


def test_changed_weights_are_prepared_anew(tokens: torch.Tensor) -> None:
    model = build("llama", 64)
    with fused_layers(model):
        old = logits(model, tokens)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    expected = logits(model, tokens)
    assert not torch.allclose(expected, old)
    with fused_layers(model):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_models_own_layers_are_back_after_an_error(tokens: torch.Tensor) -> None:
    model = build("llama", 64)
    with pytest.raises(RuntimeError, match="out of memory"), fused_layers(model):
        raise RuntimeError("CUDA error: out of memory")
    assert replaced(model) == []


def test_nothing_is_prepared_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", 64)
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with fused_layers(model):
        assert replaced(model) == []


def test_a_layer_that_somebody_else_hooked_is_left_to_them(tokens: torch.Tensor) -> None:
    model = build("llama", 64)
    calls: list[int] = []
    layer = model.model.layers[0].mlp.up_proj
    own = layer.forward

    def counting(states: torch.Tensor) -> Any:
        calls.append(1)
        return own(states)

    layer.forward = counting
    with fused_layers(model):
        logits(model, tokens)
    assert calls
    assert replaced(model) == ["model.layers.0.mlp.up_proj"]
