"""Loading full checkpoints: as transformers does, in 4 and 8 bits, on the device asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import ConfigError, ModelLoadError
from tasks.core.memory.processor import computes_in_bfloat16
from tasks.core.models.loading import ModelSpec, identify, load_model_and_tokenizer
from tests.making.model_files import edit_json, logits, spec_of

pytestmark = pytest.mark.usefixtures("own_cache")


# --- full checkpoints


def test_a_full_checkpoint_answers_as_transformers_own_loading_does(
    tiny_model_dir: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir))
    assert torch.equal(logits(loaded.model, loaded.tokenizer), logits(tiny_model, tiny_tokenizer))
    assert loaded.device == "cpu"
    assert loaded.identity.dtype == "float32"
    assert loaded.identity.quantization == "none"
    assert loaded.identity.vocab_size == len(tiny_tokenizer)


def test_a_loaded_model_neither_trains_nor_drops_out(tiny_model_dir: Path) -> None:
    model = load_model_and_tokenizer(spec_of(tiny_model_dir)).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_models_own_sampling_defaults_do_not_leak_into_our_settings(model_copy: Path) -> None:
    edit_json(
        model_copy / "generation_config.json",
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.3,
        eos_token_id=[2, 3],
    )
    generation = load_model_and_tokenizer(spec_of(model_copy)).model.generation_config
    assert generation.do_sample is False
    assert generation.temperature is None
    assert generation.top_p is None
    assert generation.top_k is None
    assert generation.repetition_penalty is None
    assert generation.eos_token_id == [2, 3]
    assert generation.pad_token_id == 3


def test_the_tokenizers_end_token_ends_answers_even_when_the_model_names_another(model_copy: Path) -> None:
    edit_json(model_copy / "generation_config.json", eos_token_id=0)
    assert load_model_and_tokenizer(spec_of(model_copy)).model.generation_config.eos_token_id == [0, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_set_and_recorded(tiny_model_dir: Path, dtype: str) -> None:
    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir, dtype=dtype))
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.identity.dtype == dtype


@pytest.mark.processor
def test_without_a_dtype_in_the_configuration_the_weights_own_is_kept(model_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {
        name: tensor.bfloat16() for name, tensor in load_file(model_copy / "model.safetensors").items()
    }
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    edit_json(model_copy / "config.json", dtype=None)
    expected = "bfloat16" if computes_in_bfloat16() else "float32"
    assert identify(spec_of(model_copy)).dtype == expected
    assert load_model_and_tokenizer(spec_of(model_copy)).model.dtype == getattr(torch, expected)


def test_identify_tells_the_same_identity_without_loading(tiny_model_dir: Path) -> None:
    for settings in ({}, {"dtype": "bfloat16"}, {"load_in_4bit": True}):
        spec = spec_of(tiny_model_dir, **settings)
        assert identify(spec) == load_model_and_tokenizer(spec).identity


def test_sharded_weights_load_and_a_missing_shard_is_named(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "sharded"
    tiny_model.save_pretrained(directory, max_shard_size="200KB")
    tiny_tokenizer.save_pretrained(directory)
    loaded = load_model_and_tokenizer(spec_of(directory))
    assert torch.equal(logits(loaded.model, loaded.tokenizer), logits(tiny_model, tiny_tokenizer))
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=shard.name):
        load_model_and_tokenizer(spec_of(directory))


# --- quantised


@pytest.mark.parametrize(("setting", "name"), [("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")])
def test_quantised_loading_on_the_cpu_is_real_and_stays_close(
    tiny_model_dir: Path, tiny_model: Any, tiny_tokenizer: Any, setting: str, name: str
) -> None:
    import bitsandbytes

    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir, **{setting: True}))
    linear = loaded.model.model.layers[0].mlp.up_proj
    assert isinstance(
        linear, {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[name]
    )
    assert loaded.identity.quantization == name
    plain, quantised = logits(tiny_model, tiny_tokenizer), logits(loaded.model, loaded.tokenizer)
    similarity = torch.nn.functional.cosine_similarity(plain, quantised, dim=-1).min()
    assert 0.9 < similarity < 0.999999


def test_4bit_is_nf4_with_double_quantisation_and_halves_the_bytes_twice(tiny_model_dir: Path) -> None:
    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir, load_in_4bit=True))
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_type == "nf4"
    assert weight.quant_state.nested
    assert weight.numel() * weight.element_size() == 64 * 128 // 2


def test_a_model_saved_in_4bit_is_recognised_and_refuses_8bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir, load_in_4bit=True))
    directory = tmp_path / "saved-4bit"
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    again = load_model_and_tokenizer(spec_of(directory))
    assert again.identity.quantization == "4bit"
    assert torch.equal(logits(again.model, again.tokenizer), logits(loaded.model, loaded.tokenizer))
    with pytest.raises(ModelLoadError, match="saved with quantisation 4bit"):
        load_model_and_tokenizer(spec_of(directory, load_in_8bit=True))


def test_asking_for_4bit_and_8bit_at_once_is_refused() -> None:
    with pytest.raises(ConfigError, match="both true"):
        ModelSpec("any", load_in_4bit=True, load_in_8bit=True)


def test_an_unknown_dtype_error_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"(?s)int3.*float32"):
        ModelSpec("any", dtype="int3")


def test_without_bitsandbytes_the_error_tells_what_to_install(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelLoadError, match=r"(?s)needs the package bitsandbytes, which.*pip install"):
        load_model_and_tokenizer(spec_of(tiny_model_dir, load_in_4bit=True))


# --- devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_asking_for_a_gpu_that_is_not_there_lists_the_devices_there_are(
    tiny_model_dir: Path, device: str
) -> None:
    with pytest.raises(ModelLoadError, match=rf"device '{device}' is not on this machine; there is: .*cpu"):
        load_model_and_tokenizer(spec_of(tiny_model_dir, device=device))


def test_auto_takes_the_best_device_there_is(tiny_model_dir: Path) -> None:
    from tasks.core.models.placement import available_devices

    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir, device="auto"))
    assert torch.device(loaded.device) == torch.device(available_devices()[0])
