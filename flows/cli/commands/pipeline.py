"""`tuneproof pipeline`: the whole job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.cli.commands.evaluate import show_scores
from flows.cli.commands.finetune import show_model
from flows.cli.commands.infer import show_run
from flows.cli.commands.promote import show_promotion
from flows.cli.options import ALL_PHASES, NO_COMMON, Common, ConfigPath, Phases, Settings
from flows.cli.starting import flow, follows, loads_models, may_begin, prepare

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult
    from tasks.core.config import Config


def pipeline(
    config: ConfigPath = None,
    /,
    *,
    common: Common = NO_COMMON,
    phases: Phases = ALL_PHASES,
    settings: Settings = None,
) -> None:
    """Fine-tune, infer, evaluate, and promote the model if it is better."""
    loaded = prepare(config, common, {**(settings or {}), **phases.as_settings()})
    if loaded.pipeline.enable_finetuning and follows(loaded, common):
        return None
    if not may_begin(loaded, common):
        return None
    pipeline_flow = flow("flows.pipeline", "finetune_infer_evaluate", loads_models=loads_models(loaded))
    result = pipeline_flow(loaded)
    return show_pipeline(result, loaded)


def show_pipeline(result: PipelineResult, config: Config) -> None:
    """Print what each phase gave."""
    if result.trained is not None:
        show_model(result.trained)
    if result.candidate is not None:
        show_run(result.candidate, config)
    if result.evaluation is not None:
        show_scores(result.evaluation, config)
    if result.promotion is not None:
        show_promotion(result.promotion, config)
