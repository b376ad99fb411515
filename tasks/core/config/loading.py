"""Settings from TOML file, environment and command line, in rising order, checked in one go.

Each value keeps its origin, so that a message can name the line, the variable or the option to correct.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from tasks.core.config.describing import choices, nearest, shown
from tasks.core.config.file import read_config_file
from tasks.core.config.legacy import LEGACY_KEYS, LEGACY_SECTIONS, LEGACY_VALUES
from tasks.core.config.problems import describe_problems
from tasks.core.config.secrets import looks_like_token, names_a_secret, secret_variable
from tasks.core.config.sections import KEY_PLACE, SECTIONS, Config, accepts
from tasks.core.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_CONFIG_PATH = Path("config.toml")
ENVIRONMENT_PREFIX = "TUNEPROOF_"
_KEY_SETTING = ("evaluator", "judge_api_key")
_VARIABLE = re.compile(r"(\$?)\$\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as given; `origin` names the place, `typed` is false for plain text (shell, ${VAR}).

    `entry` names one entry of a table, such as `enable_thinking` of chat_template_kwargs; `value` is then its.
    """

    section: str
    key: str
    value: Any
    origin: str
    typed: bool = True
    entry: str | None = None


@dataclass(slots=True)
class _Gathered:
    """Settings by (section, key), later layers over earlier ones, and the problems seen so far."""

    settings: dict[tuple[str, str], Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ignored_sections: set[str] = field(default_factory=set)


def load_config(
    path: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Load all settings: file, then `TUNEPROOF_SECTION__KEY` variables, then overrides.

    Without a path, ./config.toml is read if it exists. Override keys are `section.key`, with - or _;
    a table of tables works too. All problems are listed in one ConfigError.
    """
    environ = os.environ if environ is None else environ
    gathered = _Gathered()
    for setting in _all_layers(path, overrides or {}, environ):
        _gather(setting, environ, gathered)
    config = _checked(gathered)
    _warn_of_a_missing_judge_key(config, environ)
    return config


def as_config(source: Config | Path | str | None) -> Config:
    """Give the settings of a loaded config, of a path, or (None) of ./config.toml or the defaults."""
    return source if isinstance(source, Config) else load_config(source)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Give settings that are loaded already, with `section.key` overrides over them, checked as a whole."""
    gathered = _Gathered()
    for section, table in config.model_dump(exclude_unset=True).items():
        for key, value in table.items():
            gathered.settings[section, key] = Setting(section, key, value, "the loaded settings")
    for setting in _override_settings(overrides):
        _gather(setting, os.environ, gathered)
    return _checked(gathered)


def _all_layers(
    path: Path | str | None, overrides: Mapping[str, Any], environ: Mapping[str, str]
) -> Iterator[Setting]:
    if path is not None or DEFAULT_CONFIG_PATH.exists():
        yield from _file_settings(Path(path) if path is not None else DEFAULT_CONFIG_PATH)
    yield from _environment_settings(environ)
    yield from _override_settings(overrides)


def _file_settings(path: Path) -> Iterator[Setting]:
    file = read_config_file(path)
    for section, table in file.document.items():
        if not isinstance(table, Mapping):
            yield Setting("", section, table, _line_of(path, file.lines.get(("", section))))
            continue
        for key, value in table.items():
            yield Setting(section, key, value, _line_of(path, file.lines.get((section, key))))


def _line_of(path: Path, line: int | None) -> str:
    return str(path) if line is None else f"{path}, line {line}"


def _environment_settings(environ: Mapping[str, str]) -> Iterator[Setting]:
    for name, value in sorted(environ.items()):
        section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).partition("__")
        if name.startswith(ENVIRONMENT_PREFIX) and separator:
            key, _, entry = key.lower().partition("__")
            origin = f"environment variable {name}"
            yield Setting(section.lower(), key, value, origin, typed=False, entry=entry or None)


def _override_settings(overrides: Mapping[str, Any]) -> Iterator[Setting]:
    for name, value in overrides.items():
        if isinstance(value, Mapping) and "." not in name:
            yield from _override_settings({f"{name}.{key}": inner for key, inner in value.items()})
            continue
        section, _, key = name.replace("-", "_").rpartition(".")
        section, _, table = section.partition(".")
        entry = key if table else None
        origin = f"option --{name.replace('_', '-')}"
        yield Setting(section, table or key, value, origin, typed=not isinstance(value, str), entry=entry)


def _gather(setting: Setting, environ: Mapping[str, str], gathered: _Gathered) -> None:
    """Sort one setting into known, ignored or wrong."""
    where = f"{setting.origin}: [{setting.section}] {setting.key}"
    if (setting.section, setting.key) == _KEY_SETTING:
        _gather_key_place(setting, where, gathered)
    elif _is_secret(setting):
        gathered.problems.append(_secret_problem(where, setting))
    elif setting.section in LEGACY_SECTIONS:
        if setting.section not in gathered.ignored_sections:
            logger.warning("[%s] is ignored: %s", setting.section, LEGACY_SECTIONS[setting.section])
        gathered.ignored_sections.add(setting.section)
    elif (setting.section, setting.key) in LEGACY_KEYS:
        logger.warning("%s is ignored: %s", where, LEGACY_KEYS[setting.section, setting.key])
    elif problem := _unknown_problem(setting):
        gathered.problems.append(problem)
    else:
        _gather_known(setting, where, environ, gathered)


def _gather_key_place(setting: Setting, where: str, gathered: _Gathered) -> None:
    """The setting names the place of the key and is kept as it stands, so that no setting ever holds a key."""
    if isinstance(setting.value, str) and KEY_PLACE.match(setting.value):
        gathered.settings[_KEY_SETTING] = setting
    else:
        gathered.problems.append(
            f"{where}: names the place of the key, never the key itself; write "
            '"${OPENAI_API_KEY}" or another variable of the environment, or "secret:NAME" of a Prefect Secret block'
        )


def _warn_of_a_missing_judge_key(config: Config, environ: Mapping[str, str]) -> None:
    """Tell early, since training and inference may take hours before the evaluation misses its key."""
    evaluator = config.evaluator
    variable = evaluator.judge_api_key.strip("${}")
    elsewhere = evaluator.judge_base_url is not None or evaluator.judge_api_key.startswith("secret:")
    if evaluator.uses_an_endpoint and not elsewhere and not environ.get(variable):
        names = dict.fromkeys((*evaluator.judged_metrics, *evaluator.embedded_metrics))
        logger.warning(
            "[evaluator] metrics: the models that score %s need a key, and %s is not set: "
            "an evaluation stops and says so",
            ", ".join(names),
            variable,
        )


def _gather_known(setting: Setting, where: str, environ: Mapping[str, str], gathered: _Gathered) -> None:
    value, unset = _substituted(setting.value, environ)
    if unset:
        names = " and ".join(f"${{{name}}}" for name in unset)
        gathered.problems.append(
            f"{where} = {shown(setting.value)} uses {names}: no such environment variable is set"
        )
        return
    if any(looks_like_token(text) for text in _texts(value)):
        gathered.problems.append(_secret_problem(where, setting))
        return
    if isinstance(value, str) and not (setting.typed and value == setting.value):
        value = _read_text_value(value, setting) if setting.entry is None else _read_entry(value)
    if setting.entry is not None:
        before = gathered.settings.get((setting.section, setting.key))
        table = before.value if before is not None and isinstance(before.value, Mapping) else {}
        value = {**table, setting.entry: value}
    if isinstance(value, str) and (note := LEGACY_VALUES.get((setting.section, setting.key, value))):
        logger.warning("%s = %s %s", where, shown(value), note)
    gathered.settings[setting.section, setting.key] = replace(setting, value=value)


def _is_secret(setting: Setting) -> bool:
    """A key named like a secret (unless it is a misspelled known key), or a value that looks like one."""
    if any(looks_like_token(text) for text in _texts(setting.value)):
        return True
    known = SECTIONS[setting.section].model_fields if setting.section in SECTIONS else ()
    if setting.key in known or not names_a_secret(setting.key):
        return False
    near = nearest(setting.key, known)
    return near is None or names_a_secret(near)


def _unknown_problem(setting: Setting) -> str | None:
    """Say which section or key is unknown and which known one is spelled most alike; None when known."""
    section, key = setting.section, setting.key
    if section in SECTIONS and key in SECTIONS[section].model_fields:
        if setting.entry is None or accepts(SECTIONS[section].model_fields[key].annotation, dict):
            return None
        return f"{setting.origin}: [{section}] {key} is one value, not a table with an entry {setting.entry}"
    given = f"{setting.origin}: [{section}] {key} = {shown(setting.value)}"
    homes = [name for name, model in SECTIONS.items() if key in model.model_fields]
    if section not in SECTIONS:
        if not section and key in SECTIONS:
            return f"{setting.origin}: {key} is a section: write [{key}] with its keys below"
        if not section:
            given = f"{setting.origin}: {key} = {shown(setting.value)} stands outside a section"
            hint = (
                f"it belongs to [{'] or ['.join(homes)}]"
                if homes
                else f"sections are [{'], ['.join(SECTIONS)}]"
            )
            return f"{given}; {hint}"
        near = nearest(section, SECTIONS)
        hint = f"the nearest is [{near}]" if near else f"sections are [{'], ['.join(SECTIONS)}]"
        return f"{given}: there is no section [{section}]; {hint}"
    near = nearest(key, SECTIONS[section].model_fields)
    if homes and near is None:
        return f"{given}: [{section}] has no such key; it belongs to [{'] or ['.join(homes)}]"
    hint = f"the nearest is {near}" if near else "no known key is spelled alike"
    return f"{given}: there is no such key; {hint}"


def _secret_problem(where: str, setting: Setting) -> str:
    text = setting.value if isinstance(setting.value, str) else ""
    variable = secret_variable(text if looks_like_token(text) else setting.key)
    option = " or use --hf-key" if variable == "HF_TOKEN" else ""
    return (
        f"{where}: secrets are never settings; remove it and set the environment variable {variable}{option}"
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _substituted(value: Any, environ: Mapping[str, str]) -> tuple[Any, list[str]]:
    """Put variables in for `${VAR}`, also in lists and tables, and list the unset ones; `$${VAR}` escapes."""
    unset: list[str] = []

    def replacement(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        if match[2] not in environ:
            unset.append(match[2])
        return environ.get(match[2], match[0])

    def walk(item: Any) -> Any:
        if isinstance(item, str):
            return _VARIABLE.sub(replacement, item)
        if isinstance(item, Mapping):
            return {key: walk(inner) for key, inner in item.items()}
        return [walk(inner) for inner in item] if isinstance(item, list | tuple) else item

    return walk(value), unset


def _read_text_value(text: str, setting: Setting) -> Any:
    """Read plain text for a list or table key: JSON, TOML (`["a", "b"]`) or a,b; other texts stay as they are."""
    annotation = SECTIONS[setting.section].model_fields[setting.key].annotation
    wants_list, wants_table = accepts(annotation, tuple), accepts(annotation, dict)
    if (
        not (wants_list or wants_table)
        or text == "null"
        or (text in choices(annotation) and accepts(annotation, str))
    ):
        return text
    if text.startswith(("[", "{")):
        return _read_entry(text)
    if not wants_list or _takes_any_text(annotation):  # a name may hold a comma
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _takes_any_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(map(_takes_any_text, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _takes_any_text(get_args(annotation)[0])
    return annotation is str


def _read_entry(text: str) -> Any:
    """Read plain text for an entry of a table: a number, true, false or null, or else the text."""
    for read in (json.loads, _read_toml):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _read_toml(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


def _checked(gathered: _Gathered) -> Config:
    values: dict[str, dict[str, Any]] = {}
    for (section, key), setting in gathered.settings.items():
        values.setdefault(section, {})[key] = setting.value
    problems = list(gathered.problems)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        origins = {place: setting.origin for place, setting in gathered.settings.items()}
        found = describe_problems(error, values, origins) + _hidden_conflicts(error, values, origins)
        problems += dict.fromkeys(found)
    if problems:
        raise _as_error(problems)
    return config


def _hidden_conflicts(
    error: ValidationError, values: Mapping[str, Mapping[str, Any]], origins: Mapping[tuple[str, str], str]
) -> list[str]:
    """Conflicts between keys are looked for only where each value is right, so look again without the wrong ones.

    One that needs a key left out is no conflict of what was written.
    """
    wrong = {finding["loc"][:2] for finding in error.errors(include_url=False) if len(finding["loc"]) > 1}
    right = {
        section: {key: value for key, value in table.items() if (section, key) not in wrong}
        for section, table in values.items()
    }
    if not wrong:
        return []
    try:
        Config.model_validate(right)
    except ValidationError as hidden:
        left_out = {str(key) for _, key in wrong}
        found = describe_problems(hidden, right, origins)
        return [line for line in found if not left_out & set(re.findall(r"\w+", line))]
    return []


def _as_error(problems: list[str]) -> ConfigError:
    next_step = "correct it; docs/configuration.md describes all keys"
    if len(problems) == 1:
        return ConfigError(problems[0], next_step)
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return ConfigError(
        f"{len(problems)} settings are wrong:{lines}",
        "correct them; docs/configuration.md describes all keys",
    )
