"""LoRA adapters: on the right base, merged or beside it, with an identity of their own."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import ModelLoadError, ModelNotFoundError
from tasks.core.models.loading import identify, load_model_and_tokenizer, load_tokenizer
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.making.model_files import edit_json, logits, save_adapter, spec_of

pytestmark = pytest.mark.usefixtures("own_cache")


def test_an_adapter_answers_as_peft_does_and_names_its_base(
    tiny_model_dir: Path, tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter")
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter_dir), tiny_tokenizer)
    actual = logits(loaded.model, loaded.tokenizer)
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(actual, logits(tiny_model, tiny_tokenizer), atol=1e-2)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"  # merged: nothing of peft is left in the way
    assert loaded.identity.base_model_id == str(tiny_model_dir)
    assert loaded.identity.adapter_id == str(adapter_dir)
    assert loaded.identity.weights_sha256 == identify(spec_of(tiny_model_dir)).weights_sha256
    assert identify(spec_of(adapter_dir)) == loaded.identity


def test_an_adapter_on_a_4bit_base_is_not_merged_and_changes_the_answers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter")
    loaded = load_model_and_tokenizer(spec_of(adapter_dir, load_in_4bit=True))
    base = load_model_and_tokenizer(spec_of(tiny_model_dir, load_in_4bit=True))
    assert type(loaded.model).__name__ == "PeftModelForCausalLM"
    assert not loaded.model.training
    difference = logits(loaded.model, loaded.tokenizer) - logits(base.model, base.tokenizer)
    assert difference.abs().max() > 0.01


def test_two_adapters_on_one_base_differ_in_identity_and_a_copy_of_one_does_not(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    one = save_adapter(tiny_model_dir, tmp_path / "one", seed=1)
    two = save_adapter(tiny_model_dir, tmp_path / "two", seed=2)
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    first, second, third = (identify(spec_of(path)).content() for path in (one, two, copy))
    assert first != second
    assert first == third


def test_a_missing_base_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter", base_name="/nowhere/base-7b")
    with pytest.raises(ModelNotFoundError, match=r"adapter on /nowhere/base-7b, which is missing"):
        load_model_and_tokenizer(spec_of(adapter_dir))


def test_a_base_that_moved_together_with_its_adapter_is_found_beside_it(
    model_copy: Path, tmp_path: Path
) -> None:
    adapter_dir = save_adapter(model_copy, tmp_path / "adapter", base_name=f"/old/place/{model_copy.name}")
    assert load_model_and_tokenizer(spec_of(adapter_dir)).identity.base_model_id == str(model_copy)


def test_an_adapter_on_an_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    lower = save_adapter(tiny_model_dir, tmp_path / "lower")
    upper = save_adapter(tiny_model_dir, tmp_path / "upper", base_name=str(lower))
    with pytest.raises(ModelLoadError, match="which is an adapter itself"):
        load_model_and_tokenizer(spec_of(upper))


def test_an_adapter_with_a_tokenizer_of_its_own_brings_its_template(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter")
    assert load_tokenizer(spec_of(adapter_dir)).chat_template == tiny_tokenizer.chat_template
    own = build_tiny_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(adapter_dir)
    assert load_tokenizer(spec_of(adapter_dir)).chat_template == own.chat_template
    hashes = {identify(spec_of(path)).chat_template_sha256 for path in (adapter_dir, tiny_model_dir)}
    assert len(hashes) == 2


def test_a_base_that_changed_since_training_is_warned_of(
    model_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter_dir = save_adapter(model_copy, tmp_path / "adapter")
    digest = identify(spec_of(model_copy)).weights_sha256
    manifest = {"base_model_id": str(model_copy), "base_weights_sha256": digest}
    edit_json(adapter_dir / "tuneproof_manifest.json", **manifest)
    with caplog.at_level(logging.WARNING):
        identify(spec_of(adapter_dir))
        assert "trained on other weights" not in caplog.text
        build_tiny_model(build_tiny_tokenizer(), seed=5).save_pretrained(model_copy)
        identify(spec_of(adapter_dir))
        assert "trained on other weights" in caplog.text


def test_a_chat_template_that_changed_since_training_is_warned_of(
    model_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter_dir = save_adapter(model_copy, tmp_path / "adapter")
    template = identify(spec_of(adapter_dir)).chat_template_sha256
    edit_json(adapter_dir / "tuneproof_manifest.json", chat_template_sha256=template)
    with caplog.at_level(logging.WARNING):
        identify(spec_of(adapter_dir))
        assert "another chat template" not in caplog.text
        changed = build_tiny_tokenizer()
        changed.chat_template = "{{ messages[0]['content'] }}"
        changed.save_pretrained(adapter_dir)
        identify(spec_of(adapter_dir))
        assert "was trained with another chat template" in caplog.text


def test_an_adapter_trained_on_a_loaded_model_finds_its_base_from_any_directory(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tiny_model_dir.parent)
    loaded = load_model_and_tokenizer(spec_of(tiny_model_dir.name))  # a relative path
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(loaded.model, config).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert identify(spec_of(tmp_path / "adapter")).base_model_id == str(tiny_model_dir)
