"""The door to generation engines: what one must do, which there are, and which is chosen.

An engine takes requests from a queue and yields rows as they finish. It knows nothing of files, retries or
runs. To add one, write a class with `name`, `unsupported` and `generate` and name it in the settings as
`module:Class`; docs/engines.md shows a complete example.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tasks.core.errors import ConfigError
from tasks.core.generation.batching import RequestQueue
from tasks.core.generation.budget import TokenBudget
from tasks.core.generation.rotary import why_rows_depend
from tasks.core.records import FinishReason, GenerationSettings

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GeneratedRow:
    """One finished row: its new tokens (end token included) and how they came about."""

    position: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seconds: float
    batch_size: int


class Engine(Protocol):
    """A way to answer many prompts with one loaded model."""

    name: str

    def unsupported(self) -> str | None:
        """Say why this engine cannot answer rightly with its model and settings, or None when it can."""

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        """Answer all of `queue`, yielding rows in the order in which they finish.

        Before each step the engine calls `budget.admit` with what it will hold, after a step that fitted
        `budget.clean_batch`, and keeps within `budget.limit_tokens` and `budget.max_rows`. It calls
        `queue.finish` before yielding a row. Out-of-memory errors pass through; the caller calls
        `queue.restore` and starts over with what is left.
        """


# Engines of ours that let rows of any length share a step.
_SHARING_STEPS = ("inflight", "continuous")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that answers, and why it is not the one that was asked for (None when it is)."""

    engine: Engine
    reason: str | None = None


def engine_classes() -> dict[str, type]:
    """Return the engines by the name used in `inferencer.engine`, in the order in which "auto" tries them."""
    from tasks.core.generation.inflight import InflightEngine
    from tasks.core.generation.paged_batches import PagedBatchEngine
    from tasks.core.generation.sorted_batches import SortedBatchEngine

    return {engine.name: engine for engine in (InflightEngine, SortedBatchEngine, PagedBatchEngine)}


def choose_engine(
    name: str, model: LoadedModel, settings: GenerationSettings, *, longest_tokens: int | None = None
) -> EngineChoice:
    """Return the engine called `name` ("auto": the fastest that fits), or one that can do it, with the reason.

    `longest_tokens` is what a row may have at most, prompt and answer; None: any length.
    `name` may be `module:Class`, an engine of the user's own. Raises ConfigError for a name that no engine has.
    """
    engines = engine_classes()
    if ":" in name:
        engines = {name: _imported(name), **engines}
    if name != "auto" and name not in engines:
        raise ConfigError(f"inferencer.engine = {name!r} is not an engine", f"use auto, {', '.join(engines)}")
    wanted = engines if name == "auto" else dict.fromkeys((name, *engines))
    reasons: list[str] = []
    for candidate in wanted:
        engine: Engine = engines[candidate](model, settings)
        reason = engine.unsupported()
        if reason is None and candidate in _SHARING_STEPS:
            reason = why_rows_depend(model.model, longest_tokens)
        if reason is None:
            if reasons:
                logger.warning("engine %s answers instead: %s", candidate, "; ".join(reasons))
            return EngineChoice(engine, "; ".join(reasons) or None)
        reasons.append(f"{candidate}: {reason}")
    raise ConfigError("no engine can answer with these settings: " + "; ".join(reasons))


def _imported(name: str) -> type:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
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
    return found
