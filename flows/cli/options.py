"""Settings on the command line: `--inferencer.max-new-tokens 64` goes to the configuration, not to a command."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.core.errors import ConfigError

_SETTING = re.compile(r"--(?P<name>[A-Za-z][\w-]*\.[\w.-]+)(=(?P<value>.*))?", re.DOTALL)
_SWITCH_VALUES = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0", "null"})


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
