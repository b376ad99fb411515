"""Hub models through a Hub on this machine: pinned to a commit, never pickled, offline afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import ModelLoadError, ModelNotFoundError
from tasks.core.models.loading import identify, load_model_and_tokenizer
from tests.making.fake_hub import serve
from tests.making.model_files import edit_json, logits, save_adapter, spec_of

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_hub_model_is_pinned_to_its_commit_and_loads_offline_afterwards(
    tiny_model_dir: Path,
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    with serve(tmp_path, monkeypatch) as hub:
        commit = hub.add("anna/tiny", tiny_model_dir)
        identity = identify(spec_of("anna/tiny"))
        assert not any("safetensors" in path for path in hub.log)  # identity alone downloads no weights
        loaded = load_model_and_tokenizer(spec_of("anna/tiny"))
    assert identity == loaded.identity
    assert identity.revision == commit
    assert identity.weights_sha256 == f"hub:{commit}"
    assert torch.equal(logits(loaded.model, loaded.tokenizer), logits(tiny_model, tiny_tokenizer))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model_and_tokenizer(spec_of("anna/tiny")).identity == identity
    assert identify(spec_of("anna/tiny", revision=commit)) == identity


def test_pickled_hub_weights_are_not_even_downloaded(
    model_copy: Path, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_copy / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), model_copy / "pytorch_model.bin")
    with serve(tmp_path, monkeypatch) as hub:
        hub.add("anna/pickled", model_copy)
        with pytest.raises(ModelLoadError, match="no weights"):
            load_model_and_tokenizer(spec_of("anna/pickled"))
        assert not any("pytorch_model" in path for path in hub.log)


def test_a_hub_adapter_on_a_hub_base_keeps_the_commit_it_was_trained_on(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, monkeypatch) as hub:
        base_commit = hub.add("anna/base", tiny_model_dir)
        adapter_dir = save_adapter(tiny_model_dir, tmp_path / "adapter", base_name="anna/base")
        edit_json(adapter_dir / "adapter_config.json", revision=base_commit)
        adapter_commit = hub.add("anna/tuned", adapter_dir)
        identity = load_model_and_tokenizer(spec_of("anna/tuned")).identity
    assert identity.weights_sha256 == f"hub:{base_commit}"
    assert identity.adapter_sha256 == f"hub:{adapter_commit}"
    assert (identity.base_model_id, identity.adapter_id) == ("anna/base", "anna/tuned")
    assert any(f"{base_commit}" in path for path in hub.log)


def test_unknown_hub_models_and_revisions_are_named(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, monkeypatch) as hub:
        hub.add("anna/tiny", tiny_model_dir)
        with pytest.raises(ModelNotFoundError, match="the Hub has no model anna/tinny"):
            identify(spec_of("anna/tinny"))
        with pytest.raises(ModelNotFoundError, match="anna/tiny has no revision v9"):
            identify(spec_of("anna/tiny", revision="v9"))


def test_a_hub_that_does_not_answer_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path, monkeypatch):
        pass  # the port is now closed
    with pytest.raises(ModelNotFoundError, match="no connection"):
        identify(spec_of("anna/tiny"))
