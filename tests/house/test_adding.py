"""Each thing stands in one place: one of each is added to a copy of the house, in one file that one line lists.

An addition that needed a second place, such as a table of labels elsewhere, would not do here what it says it does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("flows", "tasks", "docs", "tests/making")


@dataclass(frozen=True)
class Addition:
    """What somebody writes: a new file if any, and lines in one other file, each below the one that begins so.

    `works` is a script that fails where the addition does not do all that it should; it runs in the copy.
    """

    works: str
    file: str | None = None
    text: str = ""
    listed_in: str = ""
    below: tuple[tuple[str, str], ...] = ()


METRIC = Addition(
    file="tasks/core/metrics/vowel_metrics.py",
    text="""
from functools import partial

import numpy

from tasks.core.metrics.answer_metrics import score_without_reference
from tasks.core.metrics.judge.judged import BothOrders, Judged, PositionBias
from tasks.core.metrics.judge.prompts import relevancy_prompt
from tasks.core.metrics.metric import BatchScores, Metric, MetricFamily, pairing


def _share(answer: str) -> float:
    return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))


def _rounder(sources):
    def score(pairs):
        more = [_share(mine.predicted_answer) > _share(other.predicted_answer) for mine, other in pairs]
        return BatchScores({"rounder": 1.0 * numpy.array(more)}, [None] * len(pairs))
    return score


def _both(question, mine, other, reference):
    return [relevancy_prompt(f"{question} {mine} {other}"), relevancy_prompt(f"{question} {other} {mine}")]


def _by_questions(verdicts):
    return float(verdicts[0].noncommittal)


VOWEL_FAMILIES = (
    MetricFamily(
        "vowel_share",
        (
            Metric(
                "vowel_share", "Share of vowels in the answer.", "counted", unscored_when="never",
                label="Vowels",
            ),
        ),
        partial(score_without_reference, metric="vowel_share", function=_share),
        models=("embedding",),
        needs="vowels",
        note="counts the letters a, e, i, o and u.",
    ),
    pairing(
        Metric("rounder", "Which of two answers has the larger share of vowels.", "counted"),
        _rounder,
        judged=Judged(
            partial(relevancy_prompt, ""),
            labels_need_reference=False,
            of_two_answers=True,
            orders=BothOrders(_both, _by_questions, lambda found: PositionBias(len(found), 0, None)),
        ),
    ),
)
""",
    listed_in="tasks/core/metrics/catalogue.py",
    below=(
        (
            "from tasks.core.metrics.user_metrics",
            "from tasks.core.metrics.vowel_metrics import VOWEL_FAMILIES",
        ),
        ("    *JUDGE_FAMILIES,", "    *VOWEL_FAMILIES,"),
    ),
    works="""
import json
import runpy

import pytest

from tasks.core.config import EvaluatorConfig, load_config
from tasks.core.errors import ConfigError
from tasks.core.evaluation.calibrating import calibrate
from tasks.core.evaluation.evaluate import settings_of
from tasks.core.evaluation.gate.gate import decide
from tasks.core.metrics.judge.labels import read_labels
from tasks.core.metrics.models.scoring_models import ScoringModels
from tests.making.evaluation_runs import evaluate_run, row, write_run
from tests.making.stub_judge import stub_judge

config = load_config(None, {"evaluator.metrics": "vowel_share,f1"}, {}).evaluator
before = write_run(here / "before", [row(i, "xyz", "a") for i in range(9)])
after = write_run(here / "after", [row(i, "ax", "a") for i in range(9)], weights="b" * 64)
summary = evaluate_run(after, before, config)
assert summary.candidate.metric("vowel_share").value == 0.5
assert summary.baseline.metric("vowel_share").value == 0
assert "Vowels 50.0 against 0.0" in summary.answer, summary.answer
assert "Vowels" in (after / "report.html").read_text()
assert '"vowel_share":0.5' in (after / "scores.jsonl").read_text()
with pytest.raises(ConfigError, match="you may mean \\"vowel_share\\""):
    load_config(None, {"evaluator.metrics": "vowel_shar"}, {})

page = runpy.run_path(str(house / "docs/generate_metrics.py"))["render"]()
assert "| `vowel_share` | `vowel_share` | Share of vowels in the answer. | 0 to 1 | higher |" in page
assert "| never | vowels | counted |" in page and "- **vowel_share** counts the letters" in page
assert '"vowel_share"' in runpy.run_path(str(house / "docs/generate_configuration.py"))["render"]()

paired = EvaluatorConfig(metrics=("rounder",))  # compares two runs' answers
assert evaluate_run(after, before, paired).comparison.metrics[0].wins == 9
assert evaluate_run(after, None, paired).candidate.metrics[0].unscored_rows == 9

with stub_judge() as stub:  # and its judge is compared with people in both orders
    labels = here / "labels.jsonl"
    line = {"metric": "rounder", "question": "q", "answer_a": "a", "answer_b": "do not know", "label": "a"}
    labels.write_text("".join(json.dumps(line | {"question": f"q{i}"}) + "\\n" for i in range(4)))
    models = ScoringModels(
        EvaluatorConfig(metrics=("rounder",), llm="stub", judge_base_url=stub.url), environ={"OPENAI_API_KEY": "key"}
    )
    (found,) = calibrate(read_labels(labels, None), models)
    assert (found.record.metric, found.record.rows, found.record.agreement) == ("rounder", 4, 1.0)
    assert found.position.rows == 4 and len(stub.calls) == 8
    models.close()

assert config.embedded_metrics == ("vowel_share",)  # so the settings of its model are part of what its figures are
other = config.model_copy(update={"embedding": "other"})
assert settings_of(other) != settings_of(config)
assert settings_of(EvaluatorConfig(embedding="other")) == settings_of(EvaluatorConfig())
""",
)

GATE_CHECK = Addition(
    file="tasks/core/evaluation/gate/name_checks.py",
    text="""
from tasks.core.evaluation.gate.case import Case, Finding, Found, Tested, check, finding


def lucky_name(case: Case) -> Found:
    yield finding("Lucky name", "undecided", f"{case.inputs.candidate.run_name} brings no luck.")


def unlucky_name(case: Case) -> Found:
    def told(adjusted: float) -> Finding:
        return Finding(check("Unlucky name", "failed", f"p is {adjusted:g} by now."), rejects=True)

    yield Tested(0.01, told)
""",
    listed_in="tasks/core/evaluation/gate/checks.py",
    below=(
        ("from tasks.core.evaluation.gate.case", "from tasks.core.evaluation.gate import name_checks"),
        ("    origin.new_questions,", "    name_checks.lucky_name,\n    name_checks.unlucky_name,"),
    ),
    works="""
from tasks.core.config import Config
from tasks.evaluator import Evaluator
from tests.making.evaluation_runs import sums, training, write_run

write_run(here / "runs/base", sums(60, 10))
training(here / "models/tuned")
write_run(here / "runs/tuned", sums(60, 60), model_id=str(here / "models/tuned"), adapter="b" * 64)
config = Config.model_validate({
    "evaluator": {"metrics": ("exact_match",), "bootstrap_resamples": 200},
    "pipeline": {"runs_dir": str(here / "runs"), "models_dir": str(here / "models")},
})
evaluator = Evaluator(config, run="tuned", baseline="base")
verdict = evaluator.run().verdict
assert [(check.name, check.outcome) for check in verdict.checks[-2:]] == [
    ("Lucky name", "undecided"), ("Unlucky name", "failed"),
]
assert verdict.decision == "reject"
# Its p value is adjusted for all that are tested: the primary metric and two watched rates besides.
assert verdict.reasons == ("p is 0.04 by now.",)
assert "tuned brings no luck." in (here / "runs/tuned/report.html").read_text()
""",
)

DATA_FORMAT = Addition(
    file="tasks/core/data/formats/card_files.py",
    text="""
from collections.abc import Iterator
from pathlib import Path

from tasks.core.data.formats.format import Row, RowFormat
from tasks.core.data.formats.texts import open_text


def _rows(path: Path, *_others: object) -> Iterator[Row]:
    with open_text(path) as file:
        for line in file:
            question, _, answer = line.decode().strip().partition("=")
            yield {"question": question, "answer": answer}


CARDS = RowFormat((".cards",), _rows)
""",
    listed_in="tasks/core/data/formats/catalogue.py",
    below=(
        ("from tasks.core.data.formats.arrow_files", "from tasks.core.data.formats.card_files import CARDS"),
        ("    ARROW,", "    CARDS,"),
    ),
    works="""
import gzip

import pytest

from tasks.core.data.sources import load_rows
from tasks.core.errors import DataError

rows = [{"question": "two and two", "answer": "4"}, {"question": "007", "answer": "NA"}]
folder = here / "folder"
folder.mkdir()
(folder / "test.cards").write_text("two and two=4\\n007=NA\\n")
(here / "test.cards.gz").write_bytes(gzip.compress((folder / "test.cards").read_bytes()))
for place in (folder / "test.cards", folder, here / "*.gz", here / "test.cards.gz"):
    assert list(load_rows(str(place), split="test")) == rows, place
(here / "notes.txt").write_text("x")
with pytest.raises(DataError, match=r"Use one of .*\\.cards"):
    load_rows(str(here / "notes.txt"), split=None)
with pytest.raises(DataError, match="Did you mean: test.cards"):
    load_rows(str(folder / "tset.cards"), split=None)
""",
)

_SEVEN, _LUCKY = "Count = setting(7", 'description="What brings luck."'

CONFIG_KEY = Addition(
    listed_in="tasks/core/config/sections.py",
    below=(
        ("    seed: Seed = setting(42, FIGURES", f"    lucky_figure: {_SEVEN}, FIGURES, {_LUCKY})"),
        (
            "    seed: Seed = setting(42, WEIGHTS",
            f"    lucky_weight: {_SEVEN}, weights(came_later=True), {_LUCKY})",
        ),
        (
            "    max_new_tokens: Count",
            f"    lucky_answer: {_SEVEN}, answers(decoding='sampling', came_later=True), {_LUCKY})",
        ),
        ('    """Section [gate]', f'    lucky_rows: {_SEVEN}, figures("verdict"), {_LUCKY})'),
    ),
    works="""
import runpy
from types import SimpleNamespace

import pytest

from tasks.core.config import Config, EvaluatorConfig, FineTunerConfig, InferencerConfig, load_config
from tasks.core.errors import ConfigError
from tasks.core.evaluation.evaluate import settings_of
from tasks.core.evaluation.summary import EvaluationSettings
from tasks.core.generation.settings import generation_settings
from tasks.core.records import RunIdentity
from tasks.core.training.identity import TrainingIdentity

(here / "config.toml").write_text("[fine_tuner]\\nlucky_weight = 8\\n")
loaded = load_config(
    here / "config.toml", {"gate.lucky-rows": 9}, {"TUNEPROOF_EVALUATOR__LUCKY_FIGURE": "10"}
)
assert (loaded.fine_tuner.lucky_weight, loaded.evaluator.lucky_figure, loaded.gate.lucky_rows) == (8, 10, 9)
with pytest.raises(ConfigError, match="the nearest is lucky_figure"):
    load_config(None, {"evaluator.luky_figure": 1}, {})
page = runpy.run_path(str(house / "docs/generate_configuration.py"))["render"]()
assert "| `lucky_figure` | What brings luck. | a whole number, at least 1 | `7` | figures |" in page
assert "| `lucky_weight` | What brings luck. | a whole number, at least 1 | `7` | weights |" in page

changed = settings_of(loaded.evaluator)
assert changed != settings_of(EvaluatorConfig()) and changed.others == {"lucky_figure": 10}
assert EvaluationSettings.model_validate_json(changed.model_dump_json()) == changed
assert settings_of(EvaluatorConfig()).others == {}  # what was evaluated before is not evaluated again


def identity(config):
    data = SimpleNamespace(
        train=SimpleNamespace(sha256="0", earlier_count=0), validation=None, chat_template_sha256="1",
        template=SimpleNamespace(writes_more=False),
    )
    base = SimpleNamespace(weights_sha256="2", adapter_sha256=None, quantization="none")
    return TrainingIdentity.of(config, base, data, "float32").settings


assert identity(loaded.fine_tuner)["lucky_weight"] == 8
assert "lucky_weight" not in identity(FineTunerConfig())


def run(**settings):
    model = {
        "model_id": "m", "weights_sha256": "0", "dtype": "float32", "chat_template_sha256": "1", "vocab_size": 9
    }
    return RunIdentity(
        model=model, rows_sha256="2", row_count=1, max_sequence_length=9, long_prompts="refuse",
        generation=generation_settings(InferencerConfig(**settings)),
    )


usual, lucky = run(), run(lucky_answer=8)
assert lucky.run_key != usual.run_key
assert list(map(str, lucky.differences(usual))) == ["lucky_answer: 8 -> None"]
assert lucky.generation.others == {"lucky_answer": 8}  # so it reaches the engine
assert RunIdentity.model_validate_json(lucky.model_dump_json()).run_key == lucky.run_key
assert run(lucky_answer=7).model_dump_json() == usual.model_dump_json() and "lucky" not in usual.model_dump_json()
assert run(temperature=0, lucky_answer=8).run_key == run(temperature=0).run_key  # it is for sampling only
""",
)

# What its rows, batches and loss come to is tried in tests/training/test_training_methods.py.
TRAINING_METHOD = Addition(
    file="tasks/core/training/methods/lucky.py",
    text="""
from tasks.core.training.methods.sft import SupervisedFineTuning


class LuckyTuning(SupervisedFineTuning):
    name = "lucky"

    def sequences(self, rows, config):
        return [range(len(rows))]
""",
    listed_in="tasks/core/training/methods/catalogue.py",
    below=(
        (
            "from tasks.core.training.methods.base",
            "from tasks.core.training.methods.lucky import LuckyTuning",
        ),
        ("    SupervisedFineTuning(),", "    LuckyTuning(),"),
    ),
    works="""
import runpy

import pytest

from tasks.core.config import FineTunerConfig, load_config
from tasks.core.errors import ConfigError
from tasks.core.training.methods.catalogue import method_of
from tasks.core.training.methods.rows import TokenizedRows
from tasks.core.training.schedule import schedule_of

usual = FineTunerConfig()
config = load_config(None, {"fine_tuner.training_method": "lucky"}, {}).fine_tuner
assert (method_of(config).name, method_of(usual).name) == ("lucky", "sft")
rows = TokenizedRows(([1, 2], [-100, 2]) for _ in range(80))
assert (schedule_of(config, rows).sequences, schedule_of(usual, rows).sequences) == (1, 80)
with pytest.raises(ConfigError, match="you may mean \\"lucky\\""):
    load_config(None, {"fine_tuner.training_method": "luky"}, {})
assert '"lucky"' in runpy.run_path(str(house / "docs/generate_configuration.py"))["render"]()
""",
)

ENGINE = Addition(
    file="tasks/core/generation/engines/instant.py",
    text="""
from tasks.core.generation.engines.base import GeneratedRow


class InstantEngine:
    name = "instant"
    shares_steps = True
    exact_in_float32 = True

    def __init__(self, model, settings):
        self.settings = settings

    def unsupported(self):
        return "beam search" if self.settings.num_beams > 1 else None

    def generate(self, queue, budget):
        while queue:
            request = queue.take()
            budget.admit(1, request.room_tokens, request.id)
            queue.finish(request.position)
            yield GeneratedRow(request.position, (), "now", "stop", 0.0, 1)
""",
    listed_in="tasks/core/generation/engines/catalogue.py",
    below=(("ENGINES = {", '    "instant": "tasks.core.generation.engines.instant:InstantEngine",'),),
    works="""
import runpy
import sys
from types import SimpleNamespace

import pytest

from tasks.core.config import load_config
from tasks.core.errors import ConfigError

page = runpy.run_path(str(house / "docs/generate_configuration.py"))["render"]()
assert '"auto", "instant", "inflight" or "generate", or module:Class' in page
with pytest.raises(ConfigError, match='you may mean "instant"'):
    load_config(None, {"inferencer.engine": "instnt"}, {})
settings = load_config(None, {"inferencer.engine": "instant"}, {}).inferencer
assert "torch" not in sys.modules

from tasks.core.evaluation.noise import why_no_noise
from tasks.core.generation.engines import choosing
from tasks.core.generation.settings import generation_settings
from tasks.core.runs.run_dir import RunDir
from tests.making.evaluation_runs import write_run

asked = []  # there is no model here, whose positions might depend on the longest row
choosing.why_rows_depend = lambda *of: asked.append(of)
for name in ("auto", settings.engine):
    choice = choosing.choose_engine(name, SimpleNamespace(model=None), generation_settings(settings))
    assert (choice.engine.name, choice.reason) == ("instant", None)
assert len(asked) == 2  # since its rows share steps
manifest = RunDir(write_run(here / "run", [])).read_manifest()
answered = manifest.model_copy(update={"engine": "instant", "device": "cpu"})
assert why_no_noise(answered) is not None
assert why_no_noise(answered.model_copy(update={"engine": "generate"})) is None
""",
)

COMMAND = Addition(
    file="flows/cli/commands/greet_somebody.py",
    text="""
from flows.cli.console import say
from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import prepare


def greet_somebody(name: str, config: ConfigPath = None, /, *, settings: Settings = None) -> None:
    '''Greet somebody by name.'''
    say(f"Hello {name}, {prepare(config, NO_COMMON, settings).inferencer.max_new_tokens}")
""",
    works="""
from contextlib import redirect_stdout
from io import StringIO

from flows.cli import commands


def said(*tokens):
    with redirect_stdout(StringIO()) as out:
        assert commands.run(tokens) == 0
    return out.getvalue()


told = said("--help")
assert "greet-somebody" in told and "Greet somebody by name." in told and "evaluate" in told
assert said("greet-somebody", "Ada", "--inferencer.max-new-tokens", "7") == "Hello Ada, 7\\n"
""",
)

ADDITIONS = {
    "a metric": METRIC,
    "a gate check": GATE_CHECK,
    "a data format": DATA_FORMAT,
    "a config key": CONFIG_KEY,
    "a training method": TRAINING_METHOD,
    "an engine": ENGINE,
    "a command": COMMAND,
}


def write(house: Path, added: Addition) -> None:
    """Do in the copy what somebody would do who adds the thing."""
    if added.file is not None:
        assert not (house / added.file).exists()
        (house / added.file).write_text(added.text)
    if added.listed_in:
        listing = house / added.listed_in
        text = listing.read_text()
        for beginning, new_line in added.below:
            (line,) = (line for line in text.splitlines() if line.startswith(beginning))
            text = text.replace(f"{line}\n", f"{line}\n{new_line}\n")
        listing.write_text(text)


def try_out(house: Path, script: str, folder: Path) -> str:
    """Run a script by the modules of `house`; what it complains of, empty where nothing is wrong."""
    beginning = (
        f"from pathlib import Path\nhere, house = Path({str(folder)!r}), Path({str(house)!r})\n"
        "import tasks.core.errors\nassert Path(tasks.core.errors.__file__).is_relative_to(house)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(house), "TUNEPROOF_CACHE": str(folder / "cache")}
    arguments = ["-c", beginning + script]
    if "sys.modules" in script:  # it asks what was imported
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    else:
        done = run_python(arguments, cwd=folder, env=environment)
    return "" if done.returncode == 0 else done.stderr


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the house, which may be changed."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / "house" / name)
    (tmp_path / "house/tests/__init__.py").touch()
    return tmp_path / "house"


@pytest.mark.parametrize("name", ADDITIONS)
def test_what_is_added_in_one_place_works_everywhere(name: str, house: Path, tmp_path: Path) -> None:
    write(house, ADDITIONS[name])
    (tmp_path / "work").mkdir()
    assert try_out(house, ADDITIONS[name].works, tmp_path / "work") == ""


def test_what_is_written_but_not_listed_is_noticed(house: Path, tmp_path: Path) -> None:
    write(house, Addition(METRIC.works, METRIC.file, METRIC.text))
    assert "[evaluator] metrics" in try_out(house, METRIC.works, tmp_path)
