"""Questions to answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.generation.answering import index_run
from tasks.core.interruption import keeps, way_on
from tasks.core.records import RunManifest
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.progress import GenerationProgress
from tasks.core.runs.published import read_predictions
from tasks.inferencer import Inferencer, PreparedRows
from tasks.sharding import answer_in_tasks
from tasks.ui.artifacts import show_file, show_sample_predictions
from tasks.ui.assets import record_predictions
from tasks.ui.progress import shown_progress
from tasks.ui.terminal_bar import left_text


@task(cache_policy=NO_CACHE, persist_result=False)
def generate_responses(inferencer: Inferencer, prepared: PreparedRows) -> LedgerIndex:
    """Answer every row that is not answered yet. Out of memory is handled further down; rows are never lost."""
    with _shown(inferencer, prepared):
        return inferencer.generate_responses(prepared)


def generate_in_shards(inferencer: Inferencer, prepared: PreparedRows) -> LedgerIndex:
    """Do the same in shards, each a task of its own under the task runner of the settings."""
    with _shown(inferencer, prepared):
        return answer_in_tasks(inferencer, prepared)


@contextmanager
def _shown(inferencer: Inferencer, prepared: PreparedRows) -> Iterator[None]:
    keeps(lambda: _kept(prepared))
    with shown_progress("generation", prepared.run_name) as show:

        def report(progress: GenerationProgress) -> None:
            show(progress.rows_done, progress.rows_total, progress_text(progress))

        inferencer.on_progress = report
        yield


def _kept(prepared: PreparedRows) -> str:
    """What an interrupted generation keeps, by the ledgers."""
    total = len(prepared.rows)
    finished = index_run(prepared.run, prepared.rows).finished
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


@task(cache_policy=NO_CACHE, persist_result=False)
def publish_predictions(inferencer: Inferencer, prepared: PreparedRows, index: LedgerIndex) -> RunManifest:
    """Write all answers in dataset order, then the manifest; show a sample."""
    manifest = inferencer.publish(prepared, index)
    show_predictions(prepared, manifest)
    record_predictions(prepared.run.path, manifest)
    return manifest


def show_predictions(prepared: PreparedRows, manifest: RunManifest) -> None:
    """Show a sample of the answers and a link to all of them."""
    path = prepared.run.predictions_path
    show_sample_predictions(manifest.run_name, read_predictions(path))
    show_file("predictions", manifest.run_name, path, prepared.sync.store)
