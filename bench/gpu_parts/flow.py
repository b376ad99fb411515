"""Part 6: a whole flow, from training rows to the report, where Prefect is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

from bench.checks.rows import Bench, Check, Row
from bench.gpu_parts import models

SETTINGS = """
[fine_tuner]
base_model_id = "{model}"
training_data_id = "{rows}"
device = "{device}"
epochs = 1
device_train_batch_size = 8
grad_accumulation = 1
run_name = "flown"

[inferencer]
testing_data_id = "{rows}"
device = "{device}"
max_rows = {max_rows}
max_new_tokens = 16
temperature = 0

[evaluator]
metrics = ["exact_match", "f1"]

[pipeline]
models_dir = "{folder}/flow-models"
runs_dir = "{folder}/flow-runs"
"""


def _pipeline(bench: Bench) -> Iterator[Row]:
    """`tuneproof pipeline`, as a person runs it."""
    if importlib.util.find_spec("prefect") is None:
        yield Row("whole pipeline", "skipped", "needs Prefect, which is not installed")
        return
    rows_path = models.training_rows(bench, "flow-rows", 16 if bench.tiny else 64)
    config_path = bench.folder / "flow.toml"
    config_path.write_text(
        SETTINGS.format(
            model=models.small_model(bench), rows=rows_path, device=bench.device,
            max_rows=8 if bench.tiny else 40, folder=bench.folder,
        )
    )  # fmt: skip
    environment = {**os.environ, "PREFECT_HOME": str(bench.folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "pipeline", str(config_path)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-3000:])
    reports = sorted((bench.folder / "flow-runs").glob("*/report.html"))
    last = (done.stdout.strip().splitlines() or ["no output"])[-1][:200]
    seen = f"exit code {done.returncode}, {len(reports)} report; last line: {last}"
    yield bench.judged_on_gpu("whole pipeline", done.returncode == 0 and bool(reports), seen)


CHECKS = (Check("whole pipeline", _pipeline, 50, 120),)
