"""The parameters that flows share: few, flat and described, so that the Prefect UI shows them as a plain form."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tasks.core.config import Config, load_config
from tasks.core.config.loading import with_overrides
from tasks.core.errors import ConfigError
from tasks.server.telling import root_run

AS_CONFIGURED: Final = "as configured"


def _none_if_empty(value: object) -> object:
    """An empty text and a zero stand for "not given": a form has no other way to leave a field alone."""
    return None if value in ("", 0) else value


_MayBeEmpty = BeforeValidator(_none_if_empty)
# A schema with null in it gives each field of the form a switch of types; without null it is a plain field.
_TextField = WithJsonSchema({"type": "string"})
_CountField = WithJsonSchema({"type": "integer", "minimum": 0})

Text = Annotated[str | None, _MayBeEmpty, _TextField]
# The form asks for a path; Python callers, such as the command line, may pass loaded settings too.
ConfigSource = Annotated[Config | str | None, _MayBeEmpty, _TextField]
Settings = Annotated[
    tuple[str, ...],
    WithJsonSchema(
        {"type": "array", "items": {"type": "string", "pattern": r"^\s*[a-z_]+\.[a-z0-9_.]+\s*=.*$"}}
    ),
]
Count = Annotated[Annotated[int, Field(ge=1)] | None, _MayBeEmpty, _CountField]
LearningRate = Annotated[
    Annotated[float, Field(gt=0, le=1)] | None,
    _MayBeEmpty,
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1}),
]
Epochs = Annotated[
    Annotated[float, Field(gt=0)] | None, _MayBeEmpty, WithJsonSchema({"type": "number", "minimum": 0})
]
Confidence = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | None,
    _MayBeEmpty,
    WithJsonSchema({"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
]
# The one number that may be zero; null leaves it as configured, at the price of a switch of types in the form.
Temperature = Annotated[float | None, Field(ge=0, le=10)]
Phases = Literal[
    "as configured",
    "fine-tuning",
    "fine-tuning and inference",
    "inference and evaluation",
    "evaluation",
    "all",
]
Method = Literal["as configured", "lora", "qlora", "full"]
Quantization = Literal["as configured", "none", "8bit", "4bit"]

_PHASES: dict[str, tuple[bool, bool, bool]] = {
    "fine-tuning": (True, False, False),
    "fine-tuning and inference": (True, True, False),
    "inference and evaluation": (False, True, True),
    "evaluation": (False, False, True),
    "all": (True, True, True),
}


def chosen_phases(phases: Phases) -> dict[str, bool]:
    """The keys of [pipeline] that the choice stands for."""
    if phases == AS_CONFIGURED:
        return {}
    finetuning, inference, evaluation = _PHASES[phases]
    return {
        "pipeline__enable_finetuning": finetuning,
        "pipeline__enable_inference": inference,
        "pipeline__enable_evaluation": evaluation,
        "pipeline__stop_after_finetuning": False,
        "pipeline__stop_after_inference": False,
    }


def chosen_method(method: Method) -> dict[str, bool]:
    """The keys of [fine_tuner] that the choice stands for."""
    if method == AS_CONFIGURED:
        return {}
    return {
        "fine_tuner__full_finetuning": method == "full",
        "fine_tuner__load_in_4bit": method == "qlora",
        "fine_tuner__load_in_8bit": False,
    }


def chosen_quantization(quantization: Quantization) -> dict[str, bool]:
    """The keys of [inferencer] that the choice stands for."""
    if quantization == AS_CONFIGURED:
        return {}
    return {
        "inferencer__load_in_4bit": quantization == "4bit",
        "inferencer__load_in_8bit": quantization == "8bit",
    }


def load_settings(config: Config | str | None, settings: tuple[str, ...] = (), **named: object) -> Config:
    """Give the settings of a file (or settings that are loaded already) with parameters over them.

    A named parameter is written `section__key`; None means that it was not given. Raises ConfigError.
    """
    overrides: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise ConfigError(
                f"the setting {setting!r} is not of the form section.key=value",
                'write for example "inferencer.max_new_tokens=64"',
            )
        overrides[key.strip()] = value
    overrides |= {name.replace("__", ".", 1): given for name, given in named.items() if given is not None}
    if isinstance(config, Config):
        loaded = with_overrides(config, overrides) if overrides else config
    else:
        loaded = load_config(config, overrides)
    return _isolated_in_deployments(loaded)


def _isolated_in_deployments(config: Config) -> Config:
    """Generate in a child process where nobody watches: its death must not end a run at night.

    Shards are left alone: their processes die one by one anyway, and a cluster's may not have children.
    """
    settings, root = config.inferencer, root_run()
    if settings.isolation != "auto" or settings.num_shards > 1 or root is None or root.deployment_id is None:
        return config
    return with_overrides(config, {"inferencer.isolation": "process"})
