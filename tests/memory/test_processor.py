"""What the processor computes in, and that hiding its instructions from PyTorch makes it another one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.config import FineTunerConfig, InferencerConfig, load_config
from tasks.core.evaluation.opponents import run_lookup
from tasks.core.memory import processor
from tasks.core.models import identifying, placement
from tasks.core.models.loading import ModelSpec, identify, load_model_and_tokenizer
from tasks.core.training.precision import choose_precision
from tasks.inferencer import Inferencer
from tests.making.model_files import edit_json
from tests.making.warm.children import warm_children  # noqa: F401

HIDDEN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

needs_x86 = pytest.mark.skipif(
    torch.cpu.get_capabilities().get("architecture") != "x86_64", reason="other processors hide nothing"
)


@needs_x86
def test_hidden_instructions_are_not_there() -> None:
    question = (
        "from tasks.core.memory import processor as p; print(p.computes_in_bfloat16(), p.prepares_bfloat16())"
    )
    command = [sys.executable, "-c", question]
    for name, value in HIDDEN.items():  # each of the two is enough to make bfloat16 slow
        told = subprocess.run(
            command, env={**os.environ, name: value}, capture_output=True, text=True, check=True
        ).stdout.split()
        assert told[0] == "False"
        assert told[1] == "False" or name == "ATEN_CPU_CAPABILITY"


@pytest.mark.processor
def test_the_rehearsal_is_real() -> None:
    """Where the two variables are set, every question is answered as on a processor with AVX2 only."""
    if any(os.environ.get(name) != value for name, value in HIDDEN.items()):
        pytest.skip("no instructions are hidden")
    assert not processor.computes_in_bfloat16()
    assert not processor.prepares_bfloat16()


@pytest.mark.processor
@pytest.mark.parametrize("full_finetuning", [False, True])
def test_bfloat16_is_trained_in_where_the_processor_computes_in_it(full_finetuning: bool) -> None:
    precision = choose_precision(FineTunerConfig(full_finetuning=full_finetuning), "bfloat16", "cpu")
    expected = "bfloat16" if processor.computes_in_bfloat16() else "float32"
    assert precision.compute == expected
    assert precision.weights == ("float32" if full_finetuning else expected)


@pytest.mark.parametrize("has", [False, True])
def test_both_kinds_of_processor_have_their_outcome(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def capabilities() -> dict[str, Any]:
        return {"architecture": "x86_64", "avx2": True, "avx512_bf16": has}

    monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(processor, "prepares_bfloat16", lambda: True)
    assert processor.computes_in_bfloat16() is has
    chosen = choose_precision(FineTunerConfig(), "bfloat16", "cpu")
    assert chosen.compute == ("bfloat16" if has else "float32")


@pytest.fixture
def half_model_dir(model_copy: Path) -> Path:
    """A model whose weights are stored in bfloat16."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model_copy / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halved, model_copy / "model.safetensors", metadata={"format": "pt"})
    edit_json(model_copy / "config.json", dtype="bfloat16")
    return model_copy


@pytest.fixture
def overrides(tmp_path: Path, half_model_dir: Path, own_cache: Path) -> dict[str, Any]:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4))
    )
    return {
        "inferencer.model": str(half_model_dir), "inferencer.testing_data_id": str(path),
        "inferencer.max_new_tokens": 3, "inferencer.temperature": 0, "inferencer.device": "cpu",
        "inferencer.run_name": "run", "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"), "gate.noise_rows": 0,
    }  # fmt: skip


def processor_that(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "computes_in_bfloat16", lambda: has)
    identifying._tell_other_dtype.cache_clear()


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_answers_are_float32_only_where_the_processor_has_no_arithmetic_in_the_weights_format(
    stored: str, half_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(half_model_dir / "config.json", dtype=stored)
    spec = ModelSpec(str(half_model_dir), device="cpu")
    kept = [replace(spec, for_training=True), replace(spec, load_in_4bit=True), replace(spec, device="cuda")]
    processor_that(True, monkeypatch)
    with_it = identify(spec)
    assert with_it.dtype == stored
    processor_that(False, monkeypatch)
    with caplog.at_level(logging.INFO):
        without, loaded = identify(spec), load_model_and_tokenizer(spec)
    assert without.dtype == loaded.identity.dtype == "float32" and without == loaded.identity
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    # Both would answer otherwise, so they are other models to a run.
    assert (without.content() == with_it.content()) == (stored == "float32")
    told = [record.message for record in caplog.records if "no arithmetic in" in record.message]
    assert len(told) == (stored != "float32")
    assert [identify(one).dtype for one in kept] == [stored] * len(kept)
    assert identify(replace(spec, dtype="bfloat16")).dtype == "bfloat16"


@pytest.mark.processor
def test_a_run_is_that_of_the_number_format_it_is_computed_in(overrides: dict[str, Any]) -> None:
    """The run of unset dtype is the one of the dtype that computes, here and on a processor without bfloat16."""
    dtype = "bfloat16" if processor.computes_in_bfloat16() else "float32"
    manifest = Inferencer(load_config(None, overrides)).infer()
    assert manifest.identity.model.dtype == dtype
    assert Inferencer(load_config(None, {**overrides, "inferencer.dtype": dtype})).infer() == manifest


@pytest.mark.usefixtures("warm_children")
def test_a_worker_with_another_processor_answers_in_the_runs_number_format(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here only this process has none: the children, as other machines of a cluster, would take another format."""
    processor_that(not processor.computes_in_bfloat16(), monkeypatch)
    shards = {
        "inferencer.num_shards": 2,
        "inferencer.shard_runner": "processes",
        "inferencer.shard_processes": 1,
    }
    manifest = Inferencer(load_config(None, {**overrides, **shards})).infer()
    assert manifest.identity.model.dtype == ("float32" if processor.computes_in_bfloat16() else "bfloat16")
    assert (manifest.row_count, manifest.error_count) == (4, 0)


def test_a_base_is_compared_in_the_candidates_number_format_whatever_the_processor(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that answered in another format is another run, so it is answered again."""
    settings = InferencerConfig(device="cpu", testing_data_id=overrides["inferencer.testing_data_id"])
    names = {}
    monkeypatch.setattr(run_lookup, "_base_of", lambda _candidate: (overrides["inferencer.model"], None))
    for has in (True, False):
        processor_that(has, monkeypatch)
        run = {**overrides, "inferencer.run_name": f"candidate-{has}", "inferencer.score_references": False}
        candidate = Inferencer(load_config(None, run)).infer()
        found = [run_lookup.find_baseline(candidate, settings)]
        processor_that(not has, monkeypatch)  # evaluated elsewhere
        found.append(run_lookup.find_baseline(candidate, settings))
        assert [one.dtype for one in found if one is not None] == ["bfloat16" if has else "float32"] * 2
        assert found[0] == found[1]
        names[has] = found[0].run_name if found[0] is not None else None
    assert names[True] != names[False]
