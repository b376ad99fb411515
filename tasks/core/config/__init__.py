"""Settings: the sections with their keys, and the loader of TOML file, environment and command line."""

from tasks.core.config.loading import as_config, load_config, with_overrides
from tasks.core.config.sections import (
    DEFAULT_BASE_MODEL_ID,
    Config,
    EvaluatorConfig,
    FineTunerConfig,
    GateConfig,
    InferencerConfig,
    PipelineConfig,
    given_markers,
)

__all__ = [
    "DEFAULT_BASE_MODEL_ID",
    "Config",
    "EvaluatorConfig",
    "FineTunerConfig",
    "GateConfig",
    "InferencerConfig",
    "PipelineConfig",
    "as_config",
    "given_markers",
    "load_config",
    "with_overrides",
]
