"""Reading the TOML file: syntax errors with line and column, and where each key stands."""

from __future__ import annotations

import logging
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.config.secrets import hide_secrets
from tasks.core.errors import ConfigError

logger = logging.getLogger(__name__)

_ERROR_PLACE = re.compile(
    r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$"
)
_TABLE = re.compile(r"^\s*\[\s*([\w-]+)\s*\]")
_KEY = re.compile(r"^\s*([\w-]+)\s*=")


class ConfigFile(NamedTuple):
    """A parsed file; `lines` maps (section, key) to its line number, counted from 1."""

    path: Path
    document: dict[str, Any]
    lines: dict[tuple[str, str], int]


def read_config_file(path: Path) -> ConfigFile:
    """Read and parse the file; ConfigError when it is missing, not UTF-8 or not TOML."""
    text = _read_text(path)
    while True:
        try:
            return ConfigFile(path, tomllib.loads(text), _key_lines(text))
        except tomllib.TOMLDecodeError as error:
            repaired = _without_trailing_comma(text, error, path)
            if repaired is None:
                raise _syntax_error(text, error, path) from None
            text = repaired


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = sorted(str(other) for other in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        found = f"there are: {', '.join(others)}" if others else "give the path of a TOML file"
        raise ConfigError(f"There is no configuration file {path}.", found) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}).",
            "save the file as UTF-8",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.", "give the path of a TOML file"
        ) from None


def _without_trailing_comma(text: str, error: tomllib.TOMLDecodeError, path: Path) -> str | None:
    """Drop a comma that ends the statement where parsing stopped; None when that is not the trouble.

    Configuration files of the original pipeline have `question_part = "...",`, which TOML forbids.
    """
    place = _ERROR_PLACE.match(str(error))
    if place is None or place["line"] is None:
        return None
    line_number, column = int(place["line"]), int(place["column"])
    lines = text.split("\n")
    line = lines[line_number - 1]
    if not re.match(r",\s*(#.*)?\r?$", line[column - 1 :]):
        return None
    logger.warning(
        "%s, line %d: the comma at the end of the line is ignored; TOML has none there", path, line_number
    )
    lines[line_number - 1] = line[: column - 1] + line[column:]
    return "\n".join(lines)


def _syntax_error(text: str, error: tomllib.TOMLDecodeError, path: Path) -> ConfigError:
    place = _ERROR_PLACE.match(str(error))
    if place is None:
        return ConfigError(f"{path} is not valid TOML: {error}.", "correct the file")
    if place["line"] is None:
        return ConfigError(
            f"{path} is not valid TOML: {place['what']} at the end of the file.",
            "look for a quote or bracket that is not closed",
        )
    line = hide_secrets(text.split("\n")[int(place["line"]) - 1].strip())
    return ConfigError(
        f"{path}, line {place['line']}, column {place['column']} is not valid TOML: {place['what']}: {line}",
        "correct that line; texts need quotes, lists need brackets",
    )


def _key_lines(text: str) -> dict[tuple[str, str], int]:
    """Find the line of each `key =` below each `[section]`; the last one wins, which is only for messages."""
    lines: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if table := _TABLE.match(line):
            section = table[1]
        elif key := _KEY.match(line):
            lines[section, key[1]] = number
    return lines
