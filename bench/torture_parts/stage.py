"""What is tortured: the works of a user on small real models, each with its beginning and its only right end."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.torture_parts.trials import Ended, Harm, command

ROWS = 24
NEW_TOKENS = 6
TRAINED_ROWS = 24
# Works that take tenths of a second: those of a short run.
SHORT_WORKS = ("infer", "promote", "rollback")
State = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One command. `begin` is copied to the place for each trial; `final` gives what must be there in the end."""

    name: str
    begin: Path
    act: Callable[[Path], object]
    final: Callable[[Path], State]
    harm: Callable[[Path, State, State], Harm] | None = None
    """Counts more than a difference from the right end, given the place, what is there and what should be."""
    refused: bool = False
    """Whether the right end is a refusal."""


class Stage:
    """A folder with models, rows and the beginnings of all works; made once for each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_dir = folder / "tiny"
        self.place = folder / "place"
        self.log_path = folder / "command.log"
        self._expected: dict[str, State] = {}
        self._seconds: dict[str, float] = {}
        load_libraries()
        if not self.model_dir.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _build(self.model_dir)
            _write_rows(folder / "rows.jsonl", ROWS)
            _write_rows(folder / "train.jsonl", TRAINED_ROWS)
        self.works = {work.name: work for work in self._works()}

    def fresh(self, work: Work) -> Path:
        """Bring the place to the beginning of a work."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(work.begin, self.place)
        return self.place

    def run(self, work: Work, **faults: Any) -> Ended:
        """Do the work once, in a process of its own; see trials.command for the faults."""
        return command(functools.partial(work.act, self.place), self.log_path, **faults)

    def expected(self, work: Work) -> State:
        """Return the state that an undisturbed work ends in. Raises RuntimeError when it does not end well."""
        if work.name not in self._expected:
            self.fresh(work)
            ended = self.run(work)
            if ended.code != (2 if work.refused else 0):
                raise RuntimeError(f"{work.name} failed undisturbed with {ended.code}: {ended.told[-2000:]}")
            self._expected[work.name], self._seconds[work.name] = work.final(self.place), ended.seconds
        return self._expected[work.name]

    def seconds(self, work: Work) -> float:
        """Return how long the undisturbed work took."""
        self.expected(work)
        return self._seconds[work.name]

    def after(self, work: Work, ended: Ended) -> Harm:
        """Judge the place after the last command of a trial, which nothing disturbed."""
        harm = seen_harm(ended)
        if ended.code is None:
            return harm
        if ended.code != (2 if work.refused else 0):
            harm.lost += 1
            harm.notes.append(f"cannot go on: {last_line(ended)}")
            return harm
        harm.add(self.compared(work))
        return harm

    def compared(self, work: Work) -> Harm:
        """Compare what is there with the right end."""
        expected = self.expected(work)
        try:
            found = work.final(self.place)
        except Exception as error:  # whatever a damaged file makes of reading it
            return Harm(silently_wrong=1, notes=[f"the end cannot be read: {type(error).__name__}: {error}"])
        harm = Harm() if work.harm is None else work.harm(self.place, found, expected)
        different = [name for name in expected if found.get(name) != expected[name]]
        if different and not harm.any:
            harm.silently_wrong += 1
        if different:
            harm.notes.append(f"differs in {', '.join(different)}")
        return harm

    def _works(self) -> list[Work]:
        from bench.torture_parts import works

        return works.all_works(self)


def seen_harm(ended: Ended) -> Harm:
    """Harm that shows in how any command ended: a traceback, or no end."""
    harm = Harm()
    if ended.code is None:
        harm.hung, harm.notes = 1, [f"no end within {ended.seconds:.0f} s"]
    if ended.has_traceback:
        harm.tracebacks, harm.notes = 1, [*harm.notes, f"traceback: {last_line(ended)}"]
    return harm


def told_harm(ended: Ended) -> Harm:
    """The same for a command that met an error of the system: it ends well, or with one message."""
    harm = seen_harm(ended)
    if not harm.any and ended.code not in (0, None) and not ended.is_refusal and not ended.killed:
        harm.tracebacks, harm.notes = 1, [f"ended with {ended.code}: {last_line(ended)}"]
    return harm


def last_line(ended: Ended) -> str:
    """Return the last line that a command printed, or its error."""
    lines = [line for line in ended.told.splitlines() if line.strip()] or ["nothing was said"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1][:240]


def digest_of(path: Path) -> str | None:
    """Digest of a file; None when there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def doubled_lines(path: Path, key: Callable[[Any], Any]) -> int:
    """How many whole lines of a file have a key that an earlier one had."""
    if not path.is_file():
        return 0
    seen: Counter[Any] = Counter()
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            seen[key(json.loads(line))] += 1
        except (ValueError, KeyError, TypeError):
            continue
    return sum(count - 1 for count in seen.values())


def load_libraries() -> None:
    """Import what every command needs, and nothing that computes: forked processes inherit it."""
    import accelerate
    import datasets
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # as the command has it
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Trainer,
    )

    import tasks.core.evaluation.evaluate
    import tasks.core.generation.engines.inflight
    import tasks.core.generation.likelihood
    import tasks.core.generation.runners.here
    import tasks.core.models.loading
    import tasks.core.training.fitting
    import tasks.core.training.run
    import tasks.core.training.weights
    import tasks.evaluator
    import tasks.finetuner
    import tasks.inferencer
    import tasks.promoter

    _ = (
        accelerate, datasets, peft, transformers, tasks, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM,
        PreTrainedTokenizerFast, Trainer,
    )  # fmt: skip


def _build(model_dir: Path) -> None:
    from tests.conftest import build_tiny_model, build_tiny_tokenizer

    tokenizer = build_tiny_tokenizer()
    build_tiny_model(tokenizer).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def _write_rows(path: Path, count: int) -> None:
    rows = (
        {"question": f"How many {'more ' * (number % 7)}has {number}?", "answer": f"{number} apples."}
        for number in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
