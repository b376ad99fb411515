"""GGUF files: the same answers as the checkpoint they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import ModelLoadError
from tasks.core.models.loading import identify, load_model_and_tokenizer
from tests.making.model_files import logits, spec_of
from tests.making.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_gguf_file_answers_as_the_checkpoint_it_was_made_from(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tiny_model, tiny_tokenizer, tmp_path / "tiny.gguf")
    loaded = load_model_and_tokenizer(spec_of(path, dtype="float32"))
    ids = torch.tensor([tiny_tokenizer.encode("Anna has 3 apples")])
    assert torch.allclose(loaded.model(ids).logits, tiny_model(ids).logits, atol=1e-5)
    assert loaded.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert loaded.tokenizer.eos_token_id == tiny_tokenizer.eos_token_id
    text = "Grüße, 7 apples"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text, add_special_tokens=False)) == text
    assert identify(spec_of(path, dtype="float32")) == loaded.identity
    assert load_model_and_tokenizer(spec_of(tmp_path, dtype="float32")).identity.content() == (
        loaded.identity.content()
    )  # a directory with one GGUF file means that file


def test_an_adapter_stands_on_a_gguf_base(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    path = write_tiny_gguf(tiny_model, tiny_tokenizer, tmp_path / "tiny.gguf")
    base = load_model_and_tokenizer(spec_of(path, dtype="float32"))
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    before = logits(base.model, base.tokenizer)
    get_peft_model(base.model, config).save_pretrained(tmp_path / "adapter")
    tuned = load_model_and_tokenizer(spec_of(tmp_path / "adapter", dtype="float32"))
    assert tuned.identity.base_model_id == str(path)
    assert not torch.allclose(logits(tuned.model, tuned.tokenizer), before, atol=1e-2)


def test_several_gguf_files_in_a_directory_are_listed(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        identify(spec_of(tmp_path))


def test_a_gguf_file_that_is_something_else_says_how_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelLoadError, match="not a GGUF file: it starts with b'<htm'"):
        load_model_and_tokenizer(spec_of(path))


def test_a_gguf_file_cut_short_is_refused_with_its_name(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tiny_model, tiny_tokenizer, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf"):
        load_model_and_tokenizer(spec_of(path))


def test_a_gguf_file_in_4bit_is_refused_with_the_way_out(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tiny_model, tiny_tokenizer, tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"(?s)GGUF file.*load_in_4bit = false"):
        load_model_and_tokenizer(spec_of(path, load_in_4bit=True))
