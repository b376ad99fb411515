"""The command line `tuneproof`: each command is a file of this package, with what it prints.

The file holds a function, or an App with commands of its own, of the file's name, and is found by that. It imports
heavy libraries inside functions, so that --help answers at once.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from cyclopts import App

from flows.cli.console import complain, unreachable_prefect, unusable_place
from flows.cli.options import split_settings
from tasks.core.errors import ConfigError, TuneproofError
from tasks.core.interruption import is_interrupted
from tasks.core.provenance import library_version

_SETTINGS_HELP = (
    "Every key of the configuration can be set as --section.key VALUE, for example "
    "--inferencer.max-new-tokens 64; docs/configuration.md lists them all."
)


def make_app() -> App:
    """Give the command line with every command of this package."""
    made = App(
        name="tuneproof",
        help="Fine-tune a language model, prove that it got better, promote it.",
        help_epilogue=_SETTINGS_HELP,
        help_format="plaintext",
        version=lambda: library_version("tuneproof"),
        result_action="return_value",
    )
    for found in pkgutil.walk_packages(__path__, f"{__name__}."):
        if not found.ispkg:
            made.command(getattr(import_module(found.name), found.name.rpartition(".")[2]))
    return made


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without tokens it is the command line of this process."""
    from flows.cli.ending import run_to_end

    return run_to_end(lambda: run(sys.argv[1:] if tokens is None else tokens))


def run(tokens: Sequence[str]) -> int:
    """Run one command and return its exit code; errors of a person's making are told without a traceback."""
    try:
        _run_command(tokens)
    except TuneproofError as error:
        if is_interrupted():
            raise
        return complain(error)
    except OSError as error:
        explained = unusable_place(error)
        if explained is None or is_interrupted():
            raise
        return complain(explained)
    except RuntimeError as error:
        explained = unreachable_prefect(error)
        if explained is None or is_interrupted():
            raise
        return complain(explained)
    return 0


def _run_command(tokens: Sequence[str]) -> None:
    settings, rest = split_settings(tokens)
    command, bound, unparsed = app.parse_args(rest)
    _refuse_followers(command)
    if "settings" in unparsed:
        bound.arguments["settings"] = settings
    elif settings:
        raise ConfigError(
            f"--{next(iter(settings))} belongs to a command.", "put a command first, see --help"
        )
    command(*bound.args, **bound.kwargs)


def _refuse_followers(command: Callable[..., object]) -> None:
    """Of several processes that torchrun has started, each would do the whole work of most commands."""
    from tasks.core.training.processes.launched import is_follower

    if is_follower() and getattr(command, "__name__", "") not in ("finetune", "pipeline"):
        raise ConfigError(
            "torchrun has started several processes of this command, which has no work to share",
            "start it without torchrun; only finetune and pipeline train in several processes",
        )


app = make_app()
