"""What the processor computes in, and that hiding its instructions from PyTorch makes it another one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tasks.core.config import FineTunerConfig
from tasks.core.memory import processor
from tasks.core.training.precision import choose_precision

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
