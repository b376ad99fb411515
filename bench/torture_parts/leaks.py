"""Secrets planted in the environment and in settings, then searched in everything that commands leave behind."""

from __future__ import annotations

import base64
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.checks.rows import Bench, Row
from bench.torture_parts.stage import Stage, last_line, seen_harm
from bench.torture_parts.trials import Ended, Harm, Tally, command, source_of

PART = "secrets"
_NAMES = (
    "HF_TOKEN", "OPENAI_API_KEY", "TUNEPROOF_JUDGE_KEY", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_KEY", "WANDB_API_KEY",
    "OWN_SECRET",
)  # fmt: skip
_FLOW_SECONDS = 300
_CONFIG = """
[fine_tuner]
base_model_id = "{model}"
training_data_id = "{folder}/train.jsonl"
device = "cpu"
epochs = 1
run_name = "trained"

[inferencer]
testing_data_id = "{folder}/rows.jsonl"
device = "cpu"
max_rows = 12
max_new_tokens = 4
temperature = 0

[evaluator]
metrics = ["exact_match"]
judge_api_key = "${{OWN_SECRET}}"

[pipeline]
models_dir = "{place}/models"
runs_dir = "{place}/runs"
"""


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Search after commands in this process's forks; in a long run after a whole flow with its database too."""
    stage, source = Stage(bench.folder / "stage"), source_of(bench, PART)
    secrets = {name: f"{name[:2].lower()}_{source.randbytes(18).hex()}" for name in _NAMES}
    tally = Tally(PART, "commands")
    for name in ("infer", "evaluate", "promote", "rollback"):
        place = stage.fresh(stage.works[name])
        act = functools.partial(stage.works[name].act, place)
        ended = command(act, stage.log_path, before=functools.partial(os.environ.update, secrets))
        tally.count(_searched(secrets, [place], ended), faults=len(secrets), what=name)
    yield tally.row(f"{len(secrets)} secrets found nowhere in what was printed and written")
    if not bench.tiny:
        yield _flow(bench, stage, secrets)


def _flow(bench: Bench, stage: Stage, secrets: dict[str, str]) -> Row:
    """A whole pipeline with Prefect's temporary server, whose database is searched too."""
    tally = Tally(PART, "pipeline and Prefect's database")
    place = bench.folder / "leaks"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    config_path = place / "config.toml"
    config_path.write_text(_CONFIG.format(model=stage.model_dir, folder=stage.folder, place=place))
    environment = {
        **os.environ, **secrets, "PREFECT_HOME": str(place / "prefect"), "TMPDIR": str(place),
        "TUNEPROOF_CACHE": str(place / "cache"),
    }  # fmt: skip
    for name in ("PREFECT_API_URL", "PREFECT_API_KEY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "pipeline", str(config_path)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_FLOW_SECONDS,
    )  # fmt: skip
    ended = Ended(done.returncode, done.stdout + done.stderr, 0.0)
    config_path.unlink()
    harm = _searched(secrets, [place], ended)
    if ended.code != 0:
        harm.lost += 1
        harm.notes.append(f"ended with {ended.code}: {last_line(ended)}")
    tally.count(harm, faults=len(secrets))
    files = [path for path in place.rglob("*") if path.is_file()]
    databases = sum(path.suffix == ".db" for path in files)
    return tally.row(f"not in {len(files)} files, of them {databases} database, nor in what was printed")


def _searched(secrets: dict[str, str], folders: list[Path], ended: Ended) -> Harm:
    """Look for each secret as it is and as Base64, in files, their names, and what was printed."""
    harm = seen_harm(ended)
    for name, secret in secrets.items():
        forms = (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="))
        places = ["what was printed"] if any(form in ended.told.encode() for form in forms) else []
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            if any(form in path.read_bytes() or form.decode() in path.name for form in forms):
                places.append(path.name)
        if places:
            harm.silently_wrong += 1
            harm.notes.append(f"{name} is in {', '.join(places)}")
    return harm
