"""Test rows to published answers, and which models answer them: the Prefect tasks of inference."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import before_training
from tasks.core.config import Config, InferencerConfig
from tasks.core.errors import ModelNotFoundError, TuneproofError
from tasks.core.evaluation.noise import repeat_of, why_no_noise
from tasks.core.evaluation.opponents.run_lookup import OpponentModel, find_baseline, find_champion
from tasks.core.generation.answering import index_run
from tasks.core.generation.plan import Answerer, RunPlan
from tasks.core.generation.runners.choosing import choose_runner
from tasks.core.generation.runners.here import Here
from tasks.core.interruption import keeps, way_on
from tasks.core.records import RunManifest
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.published import read_predictions
from tasks.core.storage.store import Store
from tasks.inferencer import Inferencer
from tasks.mapped_shards import Mapped
from tasks.server.retrying import RETRIES, RETRY_DELAYS_SECONDS, retry_if_passing
from tasks.ui.artifacts import show_file, show_sample_predictions
from tasks.ui.assets import record_predictions
from tasks.ui.progress import shown_progress
from tasks.ui.terminal_bar import Show, left_text

if TYPE_CHECKING:
    from tasks.core.models.trained.discovery import Discovery

logger = logging.getLogger(__name__)

_IN_THIS_PROCESS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
_READING: dict[str, Any] = {
    **_IN_THIS_PROCESS,
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS_SECONDS,
    "retry_condition_fn": retry_if_passing,
}


@task(**_READING)
def check_inference(config: Config, *, is_next: bool) -> None:
    """Raise what inference would refuse after the training, see `tasks.before_training`."""
    before_training.check_inference(config, is_next=is_next)


@task(**_READING)
def discover_model(inferencer: Inferencer) -> Discovery:
    """Find the model that answers; its reason is logged."""
    return inferencer.discover()


@task(**_IN_THIS_PROCESS)
def discover_baseline(candidate: RunManifest, settings: InferencerConfig) -> OpponentModel | None:
    """Find the base model of the one that answered; None when it has none."""
    baseline = find_baseline(candidate, settings)
    if baseline is None:
        logger.info("%s is no fine-tuned model: no base to compare with", candidate.identity.model.model_id)
    return baseline


@task(**_IN_THIS_PROCESS)
def discover_champion(candidate: RunManifest, config: Config) -> OpponentModel | None:
    """Find the promoted model; None when there is none, or when its files are gone, which the verdict tells."""
    try:
        return find_champion(
            candidate,
            config.inferencer,
            models_dir=Store(config.pipeline.models_dir),
            runs_dir=Store(config.pipeline.runs_dir).local,
        )
    except ModelNotFoundError as error:
        logger.warning("%s", error)
        return None


@task(**_READING)
def process_dataset(inferencer: Inferencer) -> RunPlan:
    """Open the test data, map its columns and bind the rows to their run directory."""
    return inferencer.plan()


@task(**_READING)
def load_model_and_tokenizer(answerer: Answerer) -> None:
    """Load the discovered model; it stays in this process, with who answers."""
    answerer.load_model_and_tokenizer()


def answer_rows(answerer: Answerer, plan: RunPlan) -> LedgerIndex:
    """Answer what is missing where the settings say: here, in a child, or shard by shard as tasks of their own."""
    mapped = Mapped(answerer)
    runner = choose_runner(plan, answerer, mapped=mapped)
    if runner is mapped:
        with _shown(answerer, plan):
            return mapped.answer(plan, answerer.on_progress)
    if isinstance(runner, Here):
        load_model_and_tokenizer(answerer)
    return generate_responses(answerer, plan)


@task(**_IN_THIS_PROCESS)
def generate_responses(answerer: Answerer, plan: RunPlan) -> LedgerIndex:
    """Answer every row that is not answered yet. Out of memory is handled further down; rows are never lost."""
    with _shown(answerer, plan):
        return answerer.generate_responses(plan)


@contextmanager
def _shown(answerer: Answerer, plan: RunPlan) -> Iterator[None]:
    keeps(lambda: _kept(plan))
    with shown_progress("generation", plan.run_name) as show:

        def report(progress: GenerationProgress) -> None:
            show(progress.rows_done, progress.rows_total, progress_text(progress))

        def report_references(progress: GenerationProgress) -> None:  # of a child, before it ends
            show(progress.rows_done, progress.rows_total, references_text(progress))

        answerer.on_progress, answerer.on_reference_progress = report, report_references
        try:
            yield
        finally:
            answerer.on_progress = answerer.on_reference_progress = None


@contextmanager
def _references_shown(answerer: Answerer, plan: RunPlan) -> Iterator[None]:
    """Show how far the scoring of references is, from when it begins."""
    with ExitStack() as stack:
        show: Show | None = None

        def report(progress: GenerationProgress) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(shown_progress("reference scores", plan.run_name))
            show(progress.rows_done, progress.rows_total, references_text(progress))

        answerer.on_reference_progress = report
        try:
            yield
        finally:
            answerer.on_reference_progress = None


def references_text(progress: GenerationProgress) -> str:
    """Give `450 references, 12/s, 1:20 left`, short enough for one line."""
    counted, rate = _short(progress.rows_done), _short(progress.rows_per_second)
    return ", ".join(filter(None, (f"{counted} references", f"{rate}/s", left_text(progress.eta_seconds))))


def _kept(plan: RunPlan) -> str:
    """What an interrupted generation keeps, by the ledgers."""
    total = len(plan.rows)
    finished = index_run(plan.run, plan.rows).finished
    if finished == total:
        return f"all {total:,} answers are kept; {way_on()} goes on after them"
    return f"{finished:,} of {total:,} answers are kept; {way_on()} goes on from row {finished + 1:,}"


def progress_text(progress: GenerationProgress) -> str:
    """Give `450k rows, 12/s, 3.4k tok/s, 1:20 left, 0 OOM, 2 errors, budget 131k`, short enough for one line."""
    parts = (
        f"{_short(progress.rows_done)} rows",
        f"{_short(progress.rows_per_second)}/s",
        f"{_short(progress.tokens_per_second)} tok/s",
        left_text(progress.eta_seconds),
        f"{_short(progress.out_of_memory_count)} OOM",
        f"{_short(progress.error_rows)} error{'' if progress.error_rows == 1 else 's'}",
        f"budget {_short(progress.limit_tokens)}" if progress.limit_tokens else "",
    )
    return ", ".join(filter(None, parts))


def _short(number: float) -> str:
    """Give a number in at most four characters: 0.7, 12, 1.2k, 45k, 3.1M."""
    for unit in ("", "k", "M", "G"):
        if number < 9.95:
            return f"{number:.0f}{unit}" if number == int(number) else f"{number:.1f}{unit}"
        if number < 999.5:
            return f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.0f}T"


@task(**_IN_THIS_PROCESS)
def publish_predictions(answerer: Answerer, plan: RunPlan, index: LedgerIndex) -> RunManifest:
    """Write all answers in dataset order, then the manifest; show a sample."""
    with _references_shown(answerer, plan):
        manifest = answerer.publish(plan, index)
    show_predictions(plan, manifest)
    record_predictions(plan.run.path, manifest)
    return manifest


def show_predictions(plan: RunPlan, manifest: RunManifest) -> None:
    """Show a sample of the answers and a link to all of them."""
    path = plan.run.predictions_path
    show_sample_predictions(manifest.run_name, read_predictions(path))
    show_file("predictions", manifest.run_name, path, plan.store)


def is_repeated(plan: RunPlan, manifest: RunManifest) -> bool:
    """Tell whether rows of a run are answered again: they are wanted, and can depend on the batches."""
    return plan.config.gate.noise_rows > 0 and why_no_noise(manifest) is None


@task(**_IN_THIS_PROCESS)
def repeat_some_rows(answerer: Answerer, plan: RunPlan, manifest: RunManifest) -> None:
    """Answer a few rows again for the gate, if their answers can depend on the batches; never fails the run."""
    if not is_repeated(plan, manifest):
        return
    try:
        row_count = answerer.answer_again(repeat_of(plan)).row_count
        plan.sync.pull()  # at a URL the repeat is a run with a mirror of its own
        logger.info("%d rows are answered twice, to measure the noise", row_count)
    except TuneproofError as error:
        logger.warning("the noise could not be measured: %s", error)
