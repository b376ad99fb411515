"""How a command starts: terminal, settings, what is refused or only planned, and the flow with its server."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.console import prepare_console, say, warn
from flows.cli.options import Common
from tasks.core.errors import ConfigError
from tasks.core.garbage import uncollected
from tasks.core.models.libraries import import_model_libraries

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.promotion.promotion import Promotion
    from tasks.dry_run import Plan


def prepare(path: Path | None, common: Common, settings: dict[str, Any] | None) -> Config:
    """Make the terminal ready, take the token, load the settings."""
    from tasks.core.config import load_config

    prepare_console()
    if common.hf_key:
        os.environ["HF_TOKEN"] = common.hf_key
        warn("--hf-key can be read in the list of processes and in the shell's history: better set HF_TOKEN")
    return load_config(path, settings)


def may_begin(
    config: Config, common: Common, *phases: str, run: str | None = None, baseline: str | None = None
) -> bool:
    """Refuse what is not there, before Prefect is imported; with --dry-run print the plan instead and give False.

    Without phases they are those of [pipeline].
    """
    from tasks.core.config.phases import pipeline_phases

    phases = phases or pipeline_phases(config)
    if common.dry_run:
        from tasks.dry_run import make_plan

        _show_plan(make_plan(config, phases, run=run, baseline=baseline))
        return False
    from tasks.server.presence import check_named

    check_named(config, phases, run=run, baseline=baseline)
    return True


def follows(config: Config, common: Common) -> bool:
    """Give True where torchrun has started this process beside another that leads, and take part in its training.

    Only the leading one speaks to Prefect, prints and publishes.
    """
    from tasks.core.training.processes.launched import is_follower

    if not is_follower():
        return False
    if not common.dry_run:
        from tasks.core.training.processes.joined import follow

        follow(config.fine_tuner)
    return True


def flow(module: str, name: str, *, loads_models: bool = False) -> Callable[..., Any]:
    """Import a flow, and the libraries of one that `loads_models`, while the server that it needs starts."""
    from flows.server.temporary_server import server_for_flows

    server = server_for_flows()
    with uncollected(frozen=server is not None):
        found: Callable[..., Any] = getattr(import_module(module), name)
        if server is not None and loads_models:
            import_model_libraries()
    if server is not None:
        server.wait()
    return found


def loads_models(config: Config) -> bool:
    """Whether a phase of the pipeline trains or answers."""
    from tasks.core.config.phases import FINE_TUNING, INFERENCE, pipeline_phases

    return not {FINE_TUNING, INFERENCE}.isdisjoint(pipeline_phases(config))


def announce(config: Config, promotion: Promotion) -> None:
    """Tell a Prefect server, if the environment names one; Prefect is not even imported otherwise."""
    if "PREFECT_API_URL" in os.environ:
        from flows.promotion import announce

        announce(config, promotion)


def _show_plan(plan: Plan) -> None:
    """Print the plan; ConfigError listing what stands in its way."""
    for phase in plan.phases:
        say(phase.name)
        for label, text in phase.facts:
            say(f"  {label}: {text}")
    if len(plan.problems) == 1:
        raise ConfigError(plan.problems[0])
    if plan.problems:
        listed = "".join("\n  - " + problem.replace("\n", "\n    ") for problem in plan.problems)
        raise ConfigError(f"{len(plan.problems)} things stand in the way:{listed}")
    say("Nothing was run: --dry-run.")
