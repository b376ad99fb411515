"""A process with too little memory for its settings completes, and the next one starts where it ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.making.warm.python import run_python

ROWS = 36
HEADROOM_BYTES = 800 * 2**20

# The model is tiny, but a token takes 256 KiB of cache: 36 rows of 90 tokens take all of it.
SCRIPT = """
import json, resource, sys
import psutil, torch
from tasks.core.config import load_config
from tasks.inferencer import Inferencer

torch.set_num_threads(1)
overrides, headroom = json.loads(sys.argv[1]), int(sys.argv[2])
inferencer = Inferencer(load_config(None, overrides))
prepared = inferencer.process_dataset(inferencer.load_dataset())
inferencer.load_model_and_tokenizer()
limit = psutil.Process().memory_info().vms + headroom
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
manifest = inferencer.publish(prepared, inferencer.generate_responses(prepared))
print(manifest.model_dump_json())
"""


def infer(overrides: dict[str, Any], cache_dir: Path) -> dict[str, Any]:
    """Infer in a process whose address space may grow by 800 MiB; returns the manifest."""
    arguments = ["-c", SCRIPT, json.dumps(overrides), str(HEADROOM_BYTES)]
    done = run_python(arguments, env={**os.environ, "TUNEPROOF_CACHE": str(cache_dir)})
    assert done.returncode == 0, done.stderr[-3000:]
    manifest: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return manifest


def test_a_budget_far_too_high_is_found_out_and_remembered(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    build_tiny_model(
        tokenizer,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        hidden_size=16,
        intermediate_size=32,
    ).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{n} " + "apples and coins " * 22, "answer": "1"} for n in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    overrides = {
        "inferencer.model": str(tmp_path / "model"), "inferencer.testing_data_id": str(path),
        "inferencer.max_new_tokens": 3, "inferencer.temperature": 0, "inferencer.device": "cpu",
        "inferencer.max_batch_tokens": 10**9, "inferencer.batch_size": ROWS, "inferencer.run_name": "first",
        "pipeline.runs_dir": str(tmp_path / "runs"), "pipeline.models_dir": str(tmp_path / "models"),
        "inferencer.score_references": False,
    }  # fmt: skip
    first = infer(overrides, tmp_path / "cache")
    assert first["row_count"] == ROWS
    assert first["error_count"] == 0
    kinds = [event["kind"] for event in first["memory_events"]]
    assert "out_of_memory" in kinds
    second = infer({**overrides, "inferencer.run_name": "second"}, tmp_path / "cache")
    assert second["row_count"] == ROWS
    assert [event for event in second["memory_events"] if event["kind"] == "out_of_memory"] == []

    def answers(run: str) -> list[str]:
        text = (tmp_path / "runs" / run / "inferencer_output.jsonl").read_text()
        return [json.loads(line)["predicted_answer"] for line in text.splitlines()]

    assert answers("first") == answers("second")
