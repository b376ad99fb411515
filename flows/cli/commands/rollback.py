"""`tuneproof rollback`: back to the model that was promoted before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.console import say
from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import announce, prepare

if TYPE_CHECKING:
    from tasks.core.promotion.promotion import Promotion


def rollback(
    config: ConfigPath = None,
    /,
    *,
    reason: Annotated[str | None, Parameter(help="Why; it is kept in the history.")] = None,
    settings: Settings = None,
) -> None:
    """Go back to the model that was promoted before."""
    loaded = prepare(config, NO_COMMON, settings)
    from tasks.promoter import Promoter

    promotion, _ = Promoter(loaded).roll_back(reason=reason, tell=show_rollback)
    announce(loaded, promotion)


def show_rollback(promotion: Promotion, replaced: Promotion, was_cut_off: bool) -> None:
    """Tell which model is promoted again, and that a rollback which had been cut off was not done twice."""
    say(f"promoted again: {promotion.run_name}, in place of {replaced.run_name}.")
    if was_cut_off:
        say("An earlier rollback had gone this step; to go one further, run the command again.")
