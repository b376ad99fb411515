"""`tuneproof promote`: an evaluated model becomes the promoted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.console import say
from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import announce, prepare
from tasks.core.errors import ModelLoadError
from tasks.core.storage.store import Store

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.promotion.promotion import Promotion


def promote(
    run: Annotated[str | None, Parameter(help="Model or evaluated run; none = the newest evaluated.")] = None,
    config: ConfigPath = None,
    /,
    *,
    force: Annotated[
        bool, Parameter(negative=(), help="Promote against the verdict; needs --reason.")
    ] = False,
    reason: Annotated[str | None, Parameter(help="Why; it is kept in the history.")] = None,
    settings: Settings = None,
) -> None:
    """Make a model the promoted one; refuses unless its verdict is promote."""
    loaded = prepare(config, NO_COMMON, settings)
    from tasks.core.promotion.promotion import new_promotion_id
    from tasks.promoter import Promoter

    promoter = Promoter(loaded)
    try:
        before = promoter.present()
    except ModelLoadError:  # of a damaged file, which --force writes anew
        if not force:
            raise
        before = None
    own_id = new_promotion_id()
    promotion = promoter.promote(run, reason=reason, force=force, promotion_id=own_id)
    if promotion != before:
        announce(loaded, promotion)
    if promotion.promotion_id == own_id:
        show_promotion(promotion, loaded)
    else:  # perhaps since a moment, by another machine
        by = f", by {promotion.promoted_by}" if promotion.promoted_by else ""
        say(f"{promotion.run_name} is the promoted model already{by}: nothing was changed.")


def show_promotion(promotion: Promotion, config: Config) -> None:
    """Tell which model is promoted and how to go back."""
    from tasks.core.promotion.promotion import promotion_history

    forced = ", by force" if promotion.forced else ""
    say(f'promoted: {promotion.run_name}{forced}; it answers wherever a model is called "promoted".')
    replaced = promotion_history(Store(config.pipeline.models_dir))[-1].replaced
    back = f"goes back to {replaced}" if replaced else "takes the next promotion back; this one is the first"
    say(f"`tuneproof rollback` {back}.")
