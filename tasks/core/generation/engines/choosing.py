"""Which generation engines there are, and which is chosen.

To add one, write a class with `name`, `unsupported` and `generate` (base.py) and name it in the settings as
`module:Class`; docs/engines.md shows a complete example. One of ours is a line in `catalogue.py` instead.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError
from tasks.core.generation.engines.base import Engine, shares_steps
from tasks.core.generation.engines.catalogue import ENGINES
from tasks.core.generation.engines.rotary import why_rows_depend
from tasks.core.records import GenerationSettings

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that answers, and why it is not the one that was asked for (None when it is)."""

    engine: Engine
    reason: str | None = None


def engine_classes() -> dict[str, type[Any]]:
    """Return the engines by name, in the order in which "auto" tries them."""
    return {name: _imported(place) for name, place in ENGINES.items()}


def choose_engine(
    name: str, model: LoadedModel, settings: GenerationSettings, *, longest_tokens: int | None = None
) -> EngineChoice:
    """Return the engine called `name` ("auto": the fastest that fits), or one that can do it, with the reason.

    `longest_tokens` is what a row may have at most, prompt and answer; None: any length.
    `name` may be `module:Class`, an engine of the user's own. Raises ConfigError for a name that no engine has.
    """
    engines = engine_classes()
    if ":" in name:
        engines = {name: _own(name), **engines}
    if name != "auto" and name not in engines:
        raise ConfigError(f"inferencer.engine = {name!r} is not an engine", f"use auto, {', '.join(engines)}")
    wanted = engines if name == "auto" else dict.fromkeys((name, *engines))
    reasons: list[str] = []
    for candidate in wanted:
        engine: Engine = engines[candidate](model, settings)
        reason = engine.unsupported()
        if reason is None and shares_steps(engine):
            reason = why_rows_depend(model.model, longest_tokens)
        if reason is None:
            if reasons:
                logger.warning("engine %s answers instead: %s", candidate, "; ".join(reasons))
            return EngineChoice(engine, "; ".join(reasons) or None)
        reasons.append(f"{candidate}: {reason}")
    raise ConfigError("no engine can answer with these settings: " + "; ".join(reasons))


def _imported(place: str) -> Any:
    module_name, _, class_name = place.partition(":")
    return getattr(importlib.import_module(module_name), class_name)


def _own(name: str) -> type[Any]:
    try:
        found = _imported(name)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"inferencer.engine = {name!r} cannot be imported: {exc}",
            "write module:Class of a class that Python can import from here; see docs/engines.md",
        ) from exc
    missing = [member for member in ("name", "unsupported", "generate") if not hasattr(found, member)]
    if not isinstance(found, type) or missing:
        raise ConfigError(
            f"inferencer.engine = {name!r} is not an engine: it lacks {', '.join(missing) or 'being a class'}",
            "see docs/engines.md for a complete example",
        )
    own_name = getattr(found, "name", "")
    if own_name in ENGINES and not issubclass(found, engine_classes()[own_name]):
        raise ConfigError(
            f"inferencer.engine = {name!r} is called {own_name!r}, which is an engine of tuneproof's own",
            "give it another `name`: runs are told apart by it",
        )
    return found
