"""That a model answers rightly in flight is found out once for each shape; what weights do to it is told each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.core.files import cache_dir
from tasks.core.generation.engines import inflight_support, probe_memory
from tasks.core.generation.engines.inflight_support import why_unsupported
from tasks.core.models.loading import LoadedModel
from tasks.core.records import GenerationSettings, ModelIdentity
from tests.conftest import build_tiny_model

SETTINGS = GenerationSettings(max_new_tokens=4)


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LoadedModel]:
    """The models that were tried in packed steps, with a cache of the test's own."""
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "cache"))
    found: list[LoadedModel] = []
    packed = inflight_support._packed_logits

    def noted(model: LoadedModel, *rest: Any) -> Any:
        found.append(model)
        return packed(model, *rest)

    monkeypatch.setattr(inflight_support, "_packed_logits", noted)
    return found


def of(tokenizer: Any, dtype: str = "float32", **config: Any) -> LoadedModel:
    model = build_tiny_model(tokenizer, **config)
    identity = ModelIdentity(
        model_id="tiny",
        weights_sha256="a" * 64,
        dtype=dtype,
        chat_template_sha256="c" * 64,
        vocab_size=len(tokenizer),
    )
    return LoadedModel(model, tokenizer, identity, "cpu")


def test_other_weights_of_the_same_shape_are_not_tried_again(
    tiny_tokenizer: Any, tried: list[LoadedModel]
) -> None:
    assert why_unsupported(of(tiny_tokenizer, seed=0), SETTINGS) is None
    assert why_unsupported(of(tiny_tokenizer, seed=1), SETTINGS) is None
    assert len(tried) == 1


@pytest.mark.parametrize(
    "config",
    [{"intermediate_size": 96}, {"num_key_value_heads": 4}, {"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}],
)
def test_a_model_of_another_shape_is_tried(
    config: dict[str, Any], tiny_tokenizer: Any, tried: list[LoadedModel]
) -> None:
    why_unsupported(of(tiny_tokenizer), SETTINGS)
    why_unsupported(of(tiny_tokenizer, **config), SETTINGS)
    assert len(tried) == 2


def test_another_version_of_a_library_or_of_our_engines_is_tried(
    tiny_tokenizer: Any, tried: list[LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(tiny_tokenizer)
    why_unsupported(model, SETTINGS)
    monkeypatch.setattr(probe_memory, "library_version", lambda name: f"{name} of tomorrow")
    why_unsupported(model, SETTINGS)
    monkeypatch.setattr(probe_memory, "_engines_sha256", lambda: "of tomorrow")
    why_unsupported(model, SETTINGS)
    assert len(tried) == 3


def test_weights_without_numbers_are_told_of_though_the_shape_is_known(
    tiny_tokenizer: Any, tried: list[LoadedModel]
) -> None:
    why_unsupported(of(tiny_tokenizer), SETTINGS)
    broken = of(tiny_tokenizer, seed=1)
    broken.model.model.norm.weight.data[0] = float("nan")
    assert "gives NaN or infinity" in str(why_unsupported(broken, SETTINGS))


def test_a_model_that_answers_otherwise_is_not_remembered(
    tiny_tokenizer: Any, tried: list[LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(inflight_support, "_difference", lambda mine, theirs: 0.5)
        assert "other logits" in str(why_unsupported(of(tiny_tokenizer), SETTINGS))
    assert why_unsupported(of(tiny_tokenizer), SETTINGS) is None
    assert len(tried) == 2


def test_layers_or_code_that_are_not_the_librarys_are_tried_each_time(
    tiny_tokenizer: Any, tried: list[LoadedModel]
) -> None:
    model = of(tiny_tokenizer)
    why_unsupported(model, SETTINGS)
    layer = model.model.model.layers[0].mlp
    layer.__class__ = type("OtherMLP", (type(layer),), {})
    why_unsupported(model, SETTINGS)
    model.model.__class__ = type("OwnModel", (type(model.model),), {"__module__": "own.code"})
    why_unsupported(model, SETTINGS)
    why_unsupported(model, SETTINGS)
    assert len(tried) == 4


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": 1', b"\xff\xfe", b'{"x": "y"}', b"null"])
def test_a_damaged_memory_is_ignored_and_written_anew(
    content: bytes, tiny_tokenizer: Any, tried: list[LoadedModel]
) -> None:
    path = cache_dir() / "inflight_probes.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for _ in range(2):
        assert why_unsupported(of(tiny_tokenizer), SETTINGS) is None
    assert len(tried) == 1


def test_a_cache_that_cannot_be_written_stops_nothing(
    tiny_tokenizer: Any, tried: list[LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "file" / "cache"))
    assert why_unsupported(of(tiny_tokenizer), SETTINGS) is None
