"""`tuneproof infer`: test rows to answers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flows.cli.console import say
from flows.cli.options import NO_COMMON, Common, ConfigPath, Settings
from flows.cli.starting import flow, may_begin, prepare
from tasks.core.models.libraries import import_model_libraries
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.records import RunManifest

logger = logging.getLogger(__name__)


def infer(config: ConfigPath = None, /, *, common: Common = NO_COMMON, settings: Settings = None) -> None:
    """Let a model answer the test questions; a run that was interrupted goes on where it stopped."""
    loaded = prepare(config, common, settings)
    if not may_begin(loaded, common, "inference"):
        return None
    manifest = finished_before(loaded) or flow("flows.inference", "infer", loads_models=True)(loaded)
    return show_run(manifest, loaded)


def finished_before(config: Config) -> RunManifest | None:
    """Give the manifest of a run that is finished already, where no server has to be told of it; else None.

    Raises what the flow would raise over the model, the rows and the run's directory, and NoAnswerError for a run
    without an answer. A run that lacks references, or the rows that measure the noise, is left to the flow.
    """
    if not _may_be_finished(config):
        return None
    from flows.server.temporary_server import is_server_named
    from tasks.core.evaluation.noise import find_repeat, why_no_noise
    from tasks.core.runs.published import refuse_without_answers
    from tasks.inferencer import Inferencer
    from tasks.server.retrying import is_passing

    if is_server_named():  # others see the run there, and go on from it
        return None
    import_model_libraries(weights=False)
    inferencer = Inferencer(config)
    try:
        prepared = inferencer.process_dataset(inferencer.load_dataset())
    except Exception as error:
        if is_passing(error):  # the flow tries again
            return None
        raise
    manifest = inferencer.finished(prepared)
    if manifest is None:
        return None
    refuse_without_answers(prepared.run.predictions_path, manifest)
    if config.gate.noise_rows and why_no_noise(manifest) is None and find_repeat(prepared.run.path) is None:
        return None
    logger.info("%s is complete (%d rows): nothing to generate", prepared.run.path, manifest.row_count)
    return manifest


def _may_be_finished(config: Config) -> bool:
    """Whether the run's directory here has a manifest; loads no library to tell, and asks no network."""
    from tasks.core.generation.settings import run_name
    from tasks.core.runs.run_dir import RunDir
    from tasks.server.presence import answering_model

    found, runs = answering_model(config), Store(config.pipeline.runs_dir)
    if found is None or runs.is_remote:
        return False
    run = RunDir(runs.local / run_name(config.inferencer, None, found.chosen.model_id))
    return run.manifest_path.is_file()


def show_run(manifest: RunManifest, config: Config) -> None:
    """Tell where the answers are and how many rows have one."""
    path = Store(config.pipeline.runs_dir).address_of(f"{manifest.run_name}/{manifest.predictions_path}")
    errors = f", {manifest.error_count} of them with an error" if manifest.error_count else ""
    cut = f", {manifest.truncated_prompt_count} prompts cut to fit" if manifest.truncated_prompt_count else ""
    lost = (
        f", {manifest.cut_in_thoughts_count} cut in their thoughts" if manifest.cut_in_thoughts_count else ""
    )
    say(f"answers: {path} ({manifest.row_count} rows{errors}{cut}{lost})")
