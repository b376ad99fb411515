"""Runs whose verdict is known beforehand: `python bench/verdicts.py [--keep DIR]`.

The packaged model goes through the quickstart's whole pipeline three times, by the command line as a person would
use it: a model that learnt the task, against the base model (promote); the same training again, against that
champion (inconclusive); and one trained on shuffled answers (reject). Then the second is promoted by hand and rolled
back. Prints a table; ends with status 1 at the first verdict that is not the expected one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.core.models.trained.registry import promoted_run

PROJECT = Path(__file__).resolve().parents[1]
QUICKSTART = PROJECT / "examples" / "quickstart"


@dataclass(frozen=True, slots=True)
class Story:
    """One pipeline: what is done to the model, and which verdict is right. `options` go to the command."""

    run_name: str
    told: str
    expected: str
    options: tuple[str, ...] = ()


STORIES = (
    Story("better", "learnt the task, against the base model", "promote"),
    Story("again", "the same training again, against the champion", "inconclusive"),
    Story(
        "damaged",
        "trained on shuffled answers",
        "reject",
        ("--fine-tuner.training-data-id", "shuffled.jsonl"),
    ),
)


def tuneproof(folder: Path, *arguments: str) -> str:
    """Run the command in `folder` and return what it printed; ends this script with its words when it fails."""
    command = [str(Path(sys.executable).with_name("tuneproof")), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(folder: Path) -> None:
    """Lay out the quickstart's data as in a fresh clone, and the training rows with answers in a random order."""
    (folder / "examples").mkdir(parents=True)
    (folder / "examples" / "quickstart").symlink_to(QUICKSTART)
    rows = [json.loads(line) for line in (QUICKSTART / "train.jsonl").read_bytes().splitlines()]
    answers = [row["answer"] for row in rows]
    random.Random(1).shuffle(answers)
    shuffled = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    (folder / "shuffled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shuffled), "utf-8")


def tell(folder: Path, story: Story) -> bool:
    """Run the pipeline and print its line of the table; whether the verdict is right."""
    started = time.perf_counter()
    names = ("--fine-tuner.run-name", story.run_name, "--inferencer.run-name", story.run_name)
    tuneproof(folder, "pipeline", "examples/quickstart/config.toml", *names,
              *story.options)  # fmt: skip
    seconds = time.perf_counter() - started
    (summary_path,) = (folder / "runs").glob(f"{story.run_name}*/evaluator_output_summary.json")
    summary = json.loads(summary_path.read_text("utf-8"))
    verdict = summary["verdict"]
    right: bool = verdict["decision"] == story.expected
    print(
        f"| {story.told} | {verdict['decision']}{'' if right else ' (WRONG)'} | {verdict['reasons'][0]} "
        f"| {promoted(folder)} | {seconds:.0f} |",
        flush=True,
    )
    return right


def promoted(folder: Path) -> str:
    """Return the name of the promoted run."""
    return promoted_run(folder / "models") or "none"


def main() -> int:
    """Run all three, then roll back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep", type=Path, help="a new folder for models, runs and reports, which stay there"
    )
    chosen = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as scratch:
        folder = (chosen or Path(scratch) / "verdicts").resolve()
        prepare(folder)
        print(
            "| candidate | verdict | because | promoted then | seconds |\n|---|---|---|---|---|", flush=True
        )
        right = all(tell(folder, story) for story in STORIES)
        tuneproof(
            folder, "promote", "again", "examples/quickstart/config.toml", "--force", "--reason", "a test"
        )
        forced = promoted(folder)
        tuneproof(folder, "rollback", "examples/quickstart/config.toml", "--reason", "a test")
        back = promoted(folder)
        print(f"\nPromoted by hand: {forced}; after rollback: {back}.")
    return 0 if right and (forced, back) == ("again", "better") else 1


if __name__ == "__main__":
    sys.exit(main())
