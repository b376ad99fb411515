"""What is refused before or while weights are read, each with file, value and way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import ModelLoadError, ModelNotFoundError, OutOfMemoryError
from tasks.core.models.loading import identify, load_model_and_tokenizer, load_tokenizer
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.making.model_files import edit_json, save_adapter, spec_of

pytestmark = pytest.mark.usefixtures("own_cache")


def test_pickled_weights_are_refused_with_how_to_convert_them(model_copy: Path, tiny_model: Any) -> None:
    (model_copy / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), model_copy / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"(?s)pickled weights \(pytorch_model.bin\).*save_pretrained"):
        load_model_and_tokenizer(spec_of(model_copy))


def test_a_pickled_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter")
    (adapter_dir / "adapter_model.safetensors").unlink()
    torch.save({}, adapter_dir / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"pickled weights \(adapter_model.bin\)"):
        load_model_and_tokenizer(spec_of(adapter_dir))


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "a/../../out.safetensors", "{folder}/out.safetensors"]
)
def test_an_index_that_names_weights_outside_of_the_models_folder_is_refused(
    model_copy: Path, name: str
) -> None:
    (model_copy / "model.safetensors").rename(model_copy.parent / "out.safetensors")
    (model_copy / "a").mkdir()
    weight_map = {"lm_head.weight": name.format(folder=model_copy.parent)}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ModelLoadError, match=r"index\.json names a weight file outside of the model's folder"
    ):
        load_model_and_tokenizer(spec_of(model_copy))


@pytest.mark.parametrize("kept", [0, 4, 500, 100_000])
def test_cut_safetensors_are_refused_with_file_and_size(model_copy: Path, kept: int) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors is damaged or cut short \({kept} bytes\)"):
        load_model_and_tokenizer(spec_of(model_copy))


def test_a_cut_adapter_is_refused_with_its_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter")
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors is damaged"):
        load_model_and_tokenizer(spec_of(adapter_dir))


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_noise(model_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_copy / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 of its weights, for example model\.norm\.weight"):
        load_model_and_tokenizer(spec_of(model_copy))


def test_layers_that_the_configuration_leaves_out_are_refused_instead_of_dropped(model_copy: Path) -> None:
    layers = json.loads((model_copy / "config.json").read_text())["num_hidden_layers"]
    edit_json(model_copy / "config.json", num_hidden_layers=layers - 1)
    with pytest.raises(ModelLoadError, match=rf"weights of more layers .*layers\.{layers - 1}\."):
        load_model_and_tokenizer(spec_of(model_copy))


def test_weights_of_another_size_than_the_configuration_says_are_refused_with_both(model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    edit_json(model_copy / "config.json", intermediate_size=config["intermediate_size"] + 8)
    told = r"of other sizes .*mlp\..*: \[\d+, \d+\] in the file, \[\d+, \d+\] by the configuration"
    with pytest.raises(ModelLoadError, match=told):
        load_model_and_tokenizer(spec_of(model_copy))


def test_weights_of_another_head_are_left_out_with_a_warning(
    model_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = {**load_file(model_copy / "model.safetensors"), "value_head.weight": torch.zeros(1, 4)}
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    load_model_and_tokenizer(spec_of(model_copy))
    assert "1 weights are not used by" in caplog.text and "value_head.weight" in caplog.text


def test_a_damaged_configuration_is_refused_with_its_file(model_copy: Path) -> None:
    (model_copy / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelLoadError, match=r"config\.json is damaged"):
        identify(spec_of(model_copy))


def test_an_unknown_architecture_is_explained(model_copy: Path) -> None:
    edit_json(model_copy / "config.json", model_type="quantum-banana")
    with pytest.raises(ModelLoadError, match=r"(?s)quantum-banana.*does not know the architecture"):
        load_model_and_tokenizer(spec_of(model_copy))


def test_a_model_with_code_of_its_own_needs_to_be_trusted_by_name(model_copy: Path) -> None:
    code = model_copy / "modeling_own.py"
    ran = model_copy / "ran"
    code.write_text(f"open({str(ran)!r}, 'w').write('code ran')\nclass OwnConfig: ...\nclass OwnModel: ...\n")
    edit_json(
        model_copy / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )
    for action in (load_model_and_tokenizer, identify, load_tokenizer):
        with pytest.raises(ModelLoadError, match=r"(?s)modeling_own.OwnConfig.*trust_remote_code = true"):
            action(spec_of(model_copy))
    assert not ran.exists()


def test_custom_code_of_a_built_in_architecture_is_not_needed_and_not_run(model_copy: Path) -> None:
    ran = model_copy / "ran"
    (model_copy / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w').write('code ran')\n")
    edit_json(model_copy / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    load_model_and_tokenizer(spec_of(model_copy))
    assert not ran.exists()


def test_trusted_code_of_a_model_is_run(model_copy: Path) -> None:
    (model_copy / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    edit_json(
        model_copy / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )
    loaded = load_model_and_tokenizer(spec_of(model_copy, trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnModel"


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused_with_both_sizes(
    model_copy: Path, tiny_tokenizer: Any
) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(20)])
    tokenizer.save_pretrained(model_copy)
    rows = len(tiny_tokenizer)
    with pytest.raises(
        ModelLoadError, match=rf"largest token id is {rows + 19}, .* has {rows} embedding rows"
    ):
        load_model_and_tokenizer(spec_of(model_copy))
    with pytest.raises(ModelLoadError, match="do not fit"):
        identify(spec_of(model_copy))


def test_padded_embeddings_are_fine(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    build_tiny_model(tokenizer, vocab_size=512).save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    assert load_model_and_tokenizer(spec_of(tmp_path / "padded")).identity.vocab_size == 512


def test_a_model_without_a_tokenizer_says_so(model_copy: Path) -> None:
    for path in model_copy.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        load_model_and_tokenizer(spec_of(model_copy))


def test_a_missing_padding_token_becomes_the_end_token(model_copy: Path) -> None:
    edit_json(model_copy / "tokenizer_config.json", pad_token=None)
    loaded = load_model_and_tokenizer(spec_of(model_copy))
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token_takes_the_models(model_copy: Path) -> None:
    edit_json(model_copy / "tokenizer_config.json", eos_token=None, pad_token=None)
    assert load_tokenizer(spec_of(model_copy)).eos_token == "<|im_end|>"
    edit_json(model_copy / "config.json", eos_token_id=None)
    with pytest.raises(ModelLoadError, match="neither an end nor a padding token"):
        load_tokenizer(spec_of(model_copy))


def test_a_path_that_is_not_there_and_a_hub_id_while_offline_are_told_apart() -> None:
    with pytest.raises(ModelNotFoundError, match="no file or directory /nowhere/model"):
        identify(spec_of("/nowhere/model"))
    with pytest.raises(ModelNotFoundError, match=r"someone/model is neither a local path .*HF_HUB_OFFLINE"):
        identify(spec_of("someone/model"))


def test_a_directory_that_is_no_model_and_a_file_that_is_none_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor"):
        identify(spec_of(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelLoadError, match=r"a directory or a \.gguf file is needed"):
        identify(spec_of(tmp_path / "notes.txt"))


def test_running_out_of_memory_while_loading_is_told_as_such() -> None:
    from tasks.core.models.explaining import explained

    expected = r"(?s)memory ran out while big-model was loaded.*load_in_4bit"
    with pytest.raises(OutOfMemoryError, match=expected), explained("big-model"):
        torch.empty(2**60, dtype=torch.uint8)
