"""Small makers of real model files, and damage to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tasks.core.models.loading import ModelSpec


def spec_of(model_id: Path | str, **settings: Any) -> ModelSpec:
    return ModelSpec(str(model_id), **{"device": "cpu", **settings})


def logits(model: Any, tokenizer: Any, text: str = "Anna has 3 apples") -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([tokenizer.encode(text)])).logits
    return found


def save_adapter(base_dir: Path, directory: Path, *, base_name: str | None = None, seed: int = 1) -> Path:
    """A real LoRA adapter whose weights are not zero, saved by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(directory)
    if base_name is not None:
        edit_json(directory / "adapter_config.json", base_model_name_or_path=base_name)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps(content))
