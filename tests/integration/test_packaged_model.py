"""The real packaged model: converted once, answers, and loads in 4-bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tasks.core.models.loading import ModelSpec, identify, load_model_and_tokenizer
from tasks.core.models.packaged import package_model_dir
from tests.conftest import PACKAGED_MODEL_ID

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel

pytestmark = pytest.mark.slow


def answer(loaded: LoadedModel, question: str) -> str:
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = loaded.model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


def test_smollm2_knows_the_capital_of_france(smollm2: LoadedModel) -> None:
    assert "Paris" in answer(smollm2, "What is the capital of France?")


def test_smollm2_is_identified_without_loading_and_converted_once(smollm2: LoadedModel) -> None:
    weights_path = package_model_dir(PACKAGED_MODEL_ID) / "model.safetensors"
    before = weights_path.stat()
    assert identify(ModelSpec(PACKAGED_MODEL_ID, dtype="float32")) == smollm2.identity
    again = load_model_and_tokenizer(ModelSpec(PACKAGED_MODEL_ID, device="cpu"))
    assert again.identity.dtype == "bfloat16"
    assert again.identity.weights_sha256 == smollm2.identity.weights_sha256
    after = weights_path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert smollm2.identity.revision is not None  # the package's version


def test_smollm2_in_4bit_on_the_cpu_still_knows_it(smollm2: LoadedModel) -> None:
    loaded = load_model_and_tokenizer(ModelSpec(PACKAGED_MODEL_ID, load_in_4bit=True, device="cpu"))
    assert loaded.identity.quantization == "4bit"
    assert loaded.model.get_memory_footprint() < 0.5 * smollm2.model.get_memory_footprint()
    assert "Paris" in answer(loaded, "What is the capital of France?")
