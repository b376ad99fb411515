"""A dry run: what a command would do, and what stands in its way, without training or generating anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.before_training import SOME_TIME, check_lengths, check_names, check_run_is_free, trained_name
from tasks.core.config import Config, FineTunerConfig, InferencerConfig
from tasks.core.config.phases import EVALUATION, FINE_TUNING, INFERENCE
from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.data.preflight import check_disk_space, find_overlap
from tasks.core.data.sources import DataId, described_data, training_rows, validation_rows
from tasks.core.errors import TuneproofError
from tasks.core.evaluation.outlook import outlook
from tasks.core.evaluation.wording import is_share
from tasks.core.metrics.catalogue import reported, resolve
from tasks.core.metrics.models.scoring_models import ScoringModels
from tasks.core.metrics.user_metrics import UserScore
from tasks.core.models.context_length import context_length_of, possible_length
from tasks.core.models.loading import ModelSpec, identify, load_tokenizer
from tasks.core.models.locating import locate
from tasks.core.models.placement import choose_device
from tasks.core.models.specs import find_source, read_config
from tasks.core.models.trained.registry import promoted_run
from tasks.core.prompts.tokens import PromptBuilder
from tasks.core.records import Example, ModelIdentity, RunIdentity
from tasks.core.runs.ledger import index_ledgers
from tasks.core.runs.rows import RunRows, index_rows
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.sync import RunSync
from tasks.core.storage.store import Store
from tasks.core.training.job import check_schedule
from tasks.core.training.methods.catalogue import method_of
from tasks.core.training.precision import choose_precision
from tasks.core.training.processes.choosing import process_count
from tasks.core.training.processes.on_ray.cluster import require_ray
from tasks.core.training.processes.strategy import choose_strategy
from tasks.core.training.schedule import schedule_of
from tasks.evaluator import Evaluator
from tasks.inferencer import Inferencer

if TYPE_CHECKING:
    from datasets import Dataset

# Rough sizes for the disk check only: bytes of one published row, ledger line and spreadsheet row together.
_BYTES_PER_ANSWER = 20_000
# An adapter of usual rank stays below this share of its base's weights; optimizer states are two more copies.
_ADAPTER_SHARE = 0.1
_COPIES_PER_CHECKPOINT = 3
_REJECTIONS_SHOWN = 5


@dataclass(slots=True)
class PlannedPhase:
    """One phase: facts (label, text), the problems that would end it, and of inference the test rows."""

    name: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    row_count: int | None = None

    def tell(self, label: str, text: object) -> None:
        """Add a fact."""
        self.facts.append((label, str(text)))

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Note an error as a problem and go on with the next check."""
        try:
            yield
        except TuneproofError as error:
            self.problems.append(str(error))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command would do, phase by phase."""

    phases: tuple[PlannedPhase, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that has to be put right first."""
        found = (problem for phase in self.phases for problem in phase.problems)
        return tuple(dict.fromkeys(found))  # two phases may need the same thing


def make_plan(
    config: Config, phases: Sequence[str], *, run: str | None = None, baseline: str | None = None
) -> Plan:
    """Check settings, models, data and disk of these phases; [pipeline] is not looked at.

    `run` and `baseline` are those of an evaluation and override the settings.
    """
    planned = []
    if FINE_TUNING in phases:
        planned.append(_plan_fine_tuning(config))
    if INFERENCE in phases:
        planned.append(_plan_inference(config, after_training=FINE_TUNING in phases))
    if EVALUATION in phases:
        evaluator = Evaluator(config, run=run, baseline=baseline)
        test_rows = planned[-1].row_count if INFERENCE in phases else None
        planned.append(_plan_evaluation(evaluator, test_rows, after_inference=INFERENCE in phases))
    return Plan(tuple(planned))


# --- fine-tuning


def _plan_fine_tuning(config: Config) -> PlannedPhase:
    phase, settings = PlannedPhase(FINE_TUNING), config.fine_tuner
    spec = ModelSpec.of_base(settings)
    models_dir = Store(config.pipeline.models_dir).local
    with phase.finding():
        check_schedule(settings)
    with phase.finding():
        identity = identify(spec)
        phase.tell("base model", _described(identity))
        check_disk_space(models_dir, _training_bytes(config, spec))
    with phase.finding():
        _tell_template(phase, spec, settings)
    with phase.finding():
        rows = training_rows(settings)
        _told_rows(phase, "training rows", settings.required_training_data_id, _mapped(config, rows))
        if not phase.problems:
            _tell_schedule(phase, settings, spec)
    if settings.validation_data_id is not None:
        with phase.finding():
            validation = validation_rows(settings, settings.validation_data_id)
            _told_rows(phase, "validation rows", settings.validation_data_id, _mapped(config, validation))
    with phase.finding():
        name = trained_name(config)
        phase.tell("model directory", models_dir / name.replace(SOME_TIME, "<time>"))
    with phase.finding():
        _tell_processes(phase, settings, spec)
    method = "all weights" if settings.full_finetuning else f"LoRA adapter of rank {settings.rank}"
    phase.tell("method", method)
    return phase


def _tell_processes(phase: PlannedPhase, settings: FineTunerConfig, spec: ModelSpec) -> None:
    """How many processes share the rows, what they share besides, and the memory that each device needs for it."""
    if settings.runner == "ray":
        require_ray()
        cluster = settings.runner_address or "that is there"
        phase.tell("processes", f"{settings.processes}, on the Ray cluster {cluster}")
        return
    processes = process_count(settings)
    phase.tell("processes", processes)
    if processes > 1:
        device = choose_device(settings.device)
        precision = choose_precision(settings, identify(spec).dtype, device)
        model = read_config(find_source(spec, with_weights=False))
        phase.tell("memory", choose_strategy(settings, model, precision, device, processes).described)


def _tell_schedule(phase: PlannedPhase, settings: FineTunerConfig, spec: ModelSpec) -> None:
    """What is learnt and in how many updates; the rows are tokenised for it as in training."""
    possible = possible_length(context_length_of(spec), max_sequence_length=settings.max_sequence_length)
    settings = settings.model_copy(update={"max_sequence_length": possible, "validation_data_id": None})
    data = method_of(settings).read(settings, load_tokenizer(spec))
    schedule = schedule_of(settings, data.train.rows)
    phase.tell("learnt tokens", f"{schedule.learnt_tokens:,} of {data.train.rows.token_count:,}")
    phase.tell("updates", schedule.described)
    if schedule.warning is not None:
        phase.tell("warning", schedule.warning)


def _tell_template(
    phase: PlannedPhase, spec: ModelSpec, settings: FineTunerConfig | InferencerConfig
) -> None:
    """What ends an answer by the chat template, and what prompts do with thoughts."""
    builder = PromptBuilder(
        load_tokenizer(spec),
        max_sequence_length=settings.max_sequence_length,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    if builder.template.turn_end is not None:
        phase.tell("an answer ends with", builder.template.turn_end)
    thinking = builder.thinking
    if thinking.in_words is not None:
        phase.tell("thoughts", thinking.in_words)
    if phase.name == FINE_TUNING and thinking.may_think:
        phase.tell("thoughts", "rows without any are learnt behind a prompt that asks for none")


def _mapped(config: Config, rows: Dataset) -> Iterator[Example]:
    return examples(rows, ColumnMapping.of(config.fine_tuner.model_dump()))


def _training_bytes(config: Config, spec: ModelSpec) -> int:
    files = locate(spec.model_id, spec.revision, with_weights=False)
    weights = sum(path.stat().st_size for path in files.directory.rglob("*.safetensors"))
    model = weights if config.fine_tuner.full_finetuning else int(weights * _ADAPTER_SHARE)
    return model * (1 + _COPIES_PER_CHECKPOINT * (config.fine_tuner.save_total_limit + 1))


# --- inference


def _plan_inference(config: Config, *, after_training: bool) -> PlannedPhase:
    phase, inferencer = PlannedPhase(INFERENCE), Inferencer(config)
    settings = config.inferencer
    identity: ModelIdentity | None = None
    if after_training:
        phase.tell("model", "the one that fine-tuning gives")
        with phase.finding():
            check_names(config)
            check_run_is_free(config)
        with phase.finding():
            check_lengths(config)
    else:
        with phase.finding():
            discovery = inferencer.discover()
            identity = inferencer.identify()
            phase.tell("model", f"{_described(identity)}: {discovery.chosen.reason}")
            for rejection in discovery.rejected[:_REJECTIONS_SHOWN]:
                phase.tell("not taken", f"{rejection.model_id}: {rejection.reason}")
        with phase.finding():
            _tell_template(phase, inferencer.model_spec(), settings)
    rows: RunRows | None = None
    with phase.finding():
        dataset = inferencer.load_dataset()
        rows = index_rows(lambda: inferencer.examples(dataset))
        problems = sum(example.problem is not None for example in rows.examples())
        described = f"{len(rows)} of {described_data(settings.required_testing_data_id)}"
        phase.row_count = len(rows)
        phase.tell("test rows", described + _unusable(problems, "become error rows"))
        check_disk_space(inferencer.runs.local, len(rows) * _BYTES_PER_ANSWER)
    generation = inferencer.generation_settings()
    how = f"sampled at temperature {generation.temperature:g}" if generation.do_sample else "greedy"
    phase.tell("answers", f"{how}, up to {generation.max_new_tokens} tokens")
    if rows is not None and identity is not None:
        with phase.finding():
            _tell_run(phase, inferencer, inferencer.run_identity(rows), rows)
    if rows is not None and config.fine_tuner.training_data_id is not None:
        _tell_overlap(phase, config, rows)
    return phase


def _tell_run(phase: PlannedPhase, inferencer: Inferencer, identity: RunIdentity, rows: RunRows) -> None:
    """Where the answers go, under which key, and how many are there already."""
    run = RunDir(inferencer.runs.local / inferencer.run_name(identity))
    RunSync(inferencer.runs, run).pull()
    phase.tell("run directory", inferencer.runs.url_of(run.path) if inferencer.runs.is_remote else run.path)
    phase.tell("run key", identity.run_key[:12])
    if not run.identity_path.exists():
        return
    run.claim(identity)  # writes nothing where a claim is; refuses other settings
    finished = index_ledgers(run.ledger_paths(), rows.ids, run.run_key).finished
    phase.tell("answered already", f"{finished} of {len(rows)} rows")


def _tell_overlap(phase: PlannedPhase, config: Config, rows: RunRows) -> None:
    settings = config.fine_tuner
    try:
        overlap = find_overlap(_mapped(config, training_rows(settings)), rows.examples())
    except TuneproofError:  # the fine-tuning phase tells what is wrong with its data
        return
    same = overlap.exact_test_rows + overlap.near_test_rows
    if same:
        phase.tell(
            "warning",
            f"{same} of {overlap.test_rows} test questions are training questions too "
            f"({overlap.exact_test_rows} exactly, {overlap.near_test_rows} nearly)",
        )


# --- evaluation


def _plan_evaluation(evaluator: Evaluator, test_rows: int | None, *, after_inference: bool) -> PlannedPhase:
    phase, settings = PlannedPhase(EVALUATION), evaluator.settings
    with phase.finding():
        families = resolve(settings.metrics, runs_code=False)
        phase.tell("metrics", ", ".join(family.name for family in families))
        if own := [family.name for family in families if isinstance(family.score, UserScore)]:
            phase.tell("not imported", f"{', '.join(own)}: its module is code, which a dry run does not run")
        for label, model in ScoringModels(settings).described().items():
            phase.tell(label, model)
        evaluator.check_metrics(runs_code=False)
    if not settings.judge_api_key.startswith("secret:"):
        with phase.finding():
            ScoringModels(settings).check()
    if after_inference:
        phase.tell("answers", "those of the inference phase")
        with phase.finding():
            evaluator.check_runs(candidate=False)
            _tell_outlook(phase, evaluator, test_rows)
        return phase
    with phase.finding():
        evaluator.check_runs()
        runs = evaluator.find_runs()
        phase.tell("answers", runs.candidate_path)
        phase.tell(
            "compared with", runs.baseline_path or f"nothing: {runs.no_baseline_reason or 'not asked for'}"
        )
        if runs.candidate_path.is_dir():
            _tell_outlook(phase, evaluator, RunDir(runs.candidate_path).read_manifest().row_count)
    return phase


def _tell_outlook(phase: PlannedPhase, evaluator: Evaluator, rows: int | None) -> None:
    """What so many rows can show, and which checks of the gate they cannot decide."""
    if not rows:
        return
    gate = evaluator.config.gate
    primary = evaluator.check_metrics(runs_code=False)
    if primary is None:
        return
    reports = reported(resolve(evaluator.settings.metrics, runs_code=False))
    shares = [metric.name for metric in reports if is_share(metric.minimum, metric.maximum)]
    guards = shares if gate.guard_metrics == "others" else list(gate.guard_metrics)
    has_champion = promoted_run(Store(evaluator.config.pipeline.models_dir)) is not None
    named = [name for name in guards if name != primary.name]
    for told in outlook(rows, gate, named, evaluator.settings.confidence, has_champion=has_champion):
        phase.tell("gate", told)


# --- words


def _described(identity: ModelIdentity) -> str:
    quantised = "" if identity.quantization == "none" else f", {identity.quantization}"
    return f"{identity.model_id} ({identity.dtype}{quantised})"


def _told_rows(phase: PlannedPhase, label: str, data_id: DataId, rows: Iterator[Example]) -> None:
    """Tell how many rows there are, and how many of them cannot be used."""
    total = unusable = 0
    for example in rows:
        total += 1
        unusable += example.problem is not None or example.reference is None
    phase.tell(label, f"{total} of {described_data(data_id)}{_unusable(unusable, 'are skipped')}")


def _unusable(count: int, what_becomes_of_them: str) -> str:
    return f"; {count} cannot be used and {what_becomes_of_them}" if count else ""
