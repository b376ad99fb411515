"""The training methods by name: what a config may say."""

from __future__ import annotations

from tasks.core.config import FineTunerConfig
from tasks.core.training.methods.base import TrainingMethod
from tasks.core.training.methods.sft import SupervisedFineTuning

METHODS: tuple[TrainingMethod, ...] = (
    SupervisedFineTuning(),
)  # fmt: skip


def method_of(config: FineTunerConfig) -> TrainingMethod:
    """The method that a config names."""
    (found,) = (method for method in METHODS if method.name == config.training_method)
    return found
