"""Validation loss of the default settings, and of others, on few and on many rows.

    .venv/bin/python -m bench.defaults [--data quickstart] [--rows 100 1000] [--epochs 3] [--try "rank=8 lora_alpha=8"]

Trains from the base each time, on the first rows of one set, and measures the loss of 100 other rows before the
first update and at each epoch's end. `quickstart` are the demo's questions, made up anew in any number; any other
name is a JSONL file with `question` and `answer`, whose last 100 rows are measured on. `before` are
earlier default values.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.core.config import FineTunerConfig
from tasks.core.records import ModelManifest
from tasks.core.training.run import train

VALIDATION_ROWS = 100
BEFORE = {
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "device_train_batch_size": 4,
    "grad_accumulation": 4,
    "learning_rate": 2e-4,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
}
_QUESTIONS = Path(__file__).parents[1] / "examples" / "quickstart" / "write_questions.py"


def main() -> None:
    """Train each variant on each number of rows and print the table."""
    options = _options()
    variants = {"before": BEFORE, "now": {}} | {text: _settings(text) for text in options.tried}
    table = Table("settings", "rows", "updates", *_columns(options.epochs), "best", "seconds")
    with tempfile.TemporaryDirectory() as folder:
        for rows, name in itertools.product(options.rows, options.only or variants):
            started = time.monotonic()
            manifest = _train(Path(folder), options, rows, variants[name])
            losses = [point.validation_loss for point in manifest.losses if point.validation_loss is not None]
            shown = [f"{loss:.3f}" for loss in losses]
            seconds = round(time.monotonic() - started)
            table.add_row(name, f"{rows}", f"{manifest.steps}", *shown, f"{min(losses):.3f}", f"{seconds}")
            print(json.dumps([options.data, name, rows, manifest.steps, shown, seconds]), flush=True)
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="quickstart", help="quickstart, or a JSONL file")
    parser.add_argument("--rows", type=int, nargs="+", default=[100])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--model", default=FineTunerConfig().base_model_id)
    parser.add_argument("--only", nargs="*", help="of before, now and the texts of --try")
    parser.add_argument("--try", dest="tried", nargs="*", default=[], help='settings, e.g. "lora_alpha=32"')
    options: argparse.Namespace = parser.parse_args()
    return options


def _settings(text: str) -> dict[str, Any]:
    pairs = (part.split("=", 1) for part in text.split())
    return {key: _value(value) for key, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _columns(epochs: float) -> list[str]:
    return ["untrained", *(f"epoch {epoch}" for epoch in range(1, round(epochs) + 1))]


def _train(folder: Path, options: argparse.Namespace, rows: int, settings: dict[str, Any]) -> ModelManifest:
    train_path, validation_path = folder / "train.jsonl", folder / "validation.jsonl"
    lines = _lines(options.data, rows)
    validation_path.write_text("".join(lines[:VALIDATION_ROWS]), encoding="utf-8")
    train_path.write_text("".join(lines[VALIDATION_ROWS:]), encoding="utf-8")
    config = FineTunerConfig(
        **{
            "base_model_id": options.model,
            "training_data_id": str(train_path),
            "validation_data_id": str(validation_path),
            "system_prompt_override_text": "Answer with one word." if options.data == "quickstart" else None,
            "epochs": options.epochs,
            "save_steps": 10**6,
            "save_total_limit": 1,
            **settings,
        }
    )
    run_name = f"run-{time.monotonic_ns()}"
    return train(config, models_dir=folder / "models", run_name=run_name).manifest


def _lines(data: str, rows: int) -> list[str]:
    if data != "quickstart":
        with Path(data).open(encoding="utf-8", newline="\n") as file:
            lines = list(file)
        return [*lines[-VALIDATION_ROWS:], *lines[: min(rows, len(lines) - VALIDATION_ROWS)]]
    made = itertools.islice(_made_up(rows + VALIDATION_ROWS), rows + VALIDATION_ROWS)
    return [json.dumps(row) + "\n" for row in made]


def _made_up(count: int) -> Iterator[dict[str, str]]:
    spec = importlib.util.spec_from_file_location("write_questions", _QUESTIONS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(TRAINING_ROWS=count, TEST_ROWS=0)
    yield from module.questions()


if __name__ == "__main__":
    main()
