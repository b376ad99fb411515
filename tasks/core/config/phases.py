"""The phases of the pipeline, and which of them the settings let run."""

from __future__ import annotations

from tasks.core.config.sections import Config

FINE_TUNING, INFERENCE, EVALUATION = "fine-tuning", "inference", "evaluation"


def pipeline_phases(config: Config) -> tuple[str, ...]:
    """The phases that [pipeline] lets run, in order."""
    pipeline = config.pipeline
    stopped = pipeline.stop_after_finetuning
    wanted = {
        FINE_TUNING: pipeline.enable_finetuning,
        INFERENCE: pipeline.enable_inference and not stopped,
        EVALUATION: pipeline.enable_evaluation and not stopped and not pipeline.stop_after_inference,
    }
    return tuple(name for name, runs in wanted.items() if runs)
