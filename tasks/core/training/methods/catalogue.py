"""The training methods by name."""

from __future__ import annotations

from tasks.core.config import FineTunerConfig
from tasks.core.config.describing import nearest
from tasks.core.errors import ConfigError
from tasks.core.training.methods.base import TrainingMethod
from tasks.core.training.methods.sft import SupervisedFineTuning

METHODS: tuple[TrainingMethod, ...] = (SupervisedFineTuning(),)


def method_of(config: FineTunerConfig) -> TrainingMethod:
    """The method that a config names. Raises ConfigError for a name that does not exist."""
    name = config.training_method
    found = {method.name: method for method in METHODS}
    if name in found:
        return found[name]
    near = nearest(name, found)
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(f"fine_tuner.training_method is {name!r}", f"{hint}available: {', '.join(found)}")
