"""Options that commands share, and settings: `--inferencer.max-new-tokens 64` goes to the configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tasks.core.errors import ConfigError

_SETTING = re.compile(r"--(?P<name>[A-Za-z][\w-]*\.[\w.-]+)(=(?P<value>.*))?", re.DOTALL)
_SWITCH_VALUES = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0", "null"})


ConfigPath = Annotated[Path | None, Parameter(help="TOML file; ./config.toml if it exists.")]
OpenReport = Annotated[bool, Parameter(name="--open", negative=(), help="Open the report in a browser.")]
HubKey = Annotated[str | None, Parameter(help="Access token of the Hugging Face Hub; better set HF_TOKEN.")]
# Filled in from --section.key VALUE, not by cyclopts.
Settings = Annotated[dict[str, Any] | None, Parameter(parse=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of all commands that run something."""

    hf_key: HubKey = None
    dry_run: Annotated[
        bool,
        Parameter(negative=(), help="Check settings, model, data and disk; print the plan; run nothing."),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True)
class Phases:
    """Which phases of the pipeline run."""

    skip_finetuning: Annotated[bool, Parameter(negative=(), help="Leave fine-tuning out.")] = False
    skip_inference: Annotated[bool, Parameter(negative=(), help="Leave inference out.")] = False
    skip_evaluation: Annotated[bool, Parameter(negative=(), help="Leave evaluation out.")] = False
    stop_after_finetuning: Annotated[bool, Parameter(negative=(), help="End after fine-tuning.")] = False
    stop_after_inference: Annotated[bool, Parameter(negative=(), help="End after inference.")] = False

    def as_settings(self) -> dict[str, Any]:
        """Give the keys of [pipeline] that the options stand for."""
        chosen = {
            "pipeline.enable_finetuning": (self.skip_finetuning, False),
            "pipeline.enable_inference": (self.skip_inference, False),
            "pipeline.enable_evaluation": (self.skip_evaluation, False),
            "pipeline.stop_after_finetuning": (self.stop_after_finetuning, True),
            "pipeline.stop_after_inference": (self.stop_after_inference, True),
        }
        return {key: value for key, (given, value) in chosen.items() if given}


NO_COMMON, ALL_PHASES = Common(), Phases()


def split_settings(tokens: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Part the command line into settings (`section.key` -> text) and the rest, in order.

    A true/false setting may stand alone and then means true. ConfigError when another lacks its value.
    """
    settings: dict[str, str] = {}
    rest: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        following = tokens[position + 1] if position + 1 < len(tokens) else None
        position += 1
        match = _SETTING.fullmatch(token)
        if match is None:
            rest.append(token)
        elif match["value"] is not None:
            settings[match["name"]] = match["value"]
        elif _is_switch(match["name"]) and (following is None or following.lower() not in _SWITCH_VALUES):
            settings[match["name"]] = "true"
        elif following is None or following.startswith("--"):
            raise ConfigError(f"{token} has no value.", f"write {token} VALUE, or {token}=VALUE")
        else:
            settings[match["name"]] = following
            position += 1
    return settings, rest


def _is_switch(name: str) -> bool:
    """Tell whether a setting is true or false and nothing else, or at least may be."""
    from tasks.core.config.sections import SECTIONS, accepts

    section, _, key = name.replace("-", "_").partition(".")
    fields = SECTIONS[section].model_fields if section in SECTIONS else {}
    return key in fields and accepts(fields[key].annotation, bool)
