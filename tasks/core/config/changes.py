"""What each setting changes, declared where the setting is: identities of runs and trainings are derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

Effect = Literal["answers", "weights", "figures", "nothing"]
Kind = Literal["adapter"]
Decoding = Literal["sampling", "beams"]
ScoringModel = Literal["judge", "embedding", "bert_score"]


@dataclass(frozen=True, slots=True)
class Changes:
    """What another value of a setting changes.

    `within` names the part of an identity that stands for the setting where the setting itself is not in it: the
    digest of the rows for a column's name. `kind` is set where only trainings of that kind look at it, `used_by`
    where only that model of an evaluation does, `decoding` where only answers that are found so do, and `unused` is
    what then stands for it elsewhere. A setting that `came_later` than the first identities is not in them at its
    default, so that what was done before it keeps the identity it had.
    """

    effect: Effect
    within: str | None = None
    kind: Kind | None = None
    used_by: ScoringModel | None = None
    decoding: Decoding | None = None
    unused: Any = None
    came_later: bool = False


def answers(
    within: str | None = None,
    *,
    decoding: Decoding | None = None,
    unused: Any = None,
    came_later: bool = False,
) -> Changes:
    """Another answer of the model to the same question."""
    return Changes("answers", within, decoding=decoding, unused=unused, came_later=came_later)


def weights(within: str | None = None, *, kind: Kind | None = None, came_later: bool = False) -> Changes:
    """Other trained weights."""
    return Changes("weights", within, kind=kind, came_later=came_later)


def figures(within: str | None = None, *, used_by: ScoringModel | None = None) -> Changes:
    """Other scores, comparisons or verdicts of the same answers."""
    return Changes("figures", within, used_by=used_by)


WEIGHTS, ANSWERS, FIGURES = weights(), answers(), figures()
NOTHING = Changes("nothing")
"""Only names, places, speed or what is shown."""


def setting(default: Any, *changes: Changes, description: str) -> Any:
    """A key of a section. With several `changes`, each section takes the one that is its own `outcome`."""
    declared: list[Any] = [asdict(one) for one in changes]
    return Field(default, description=description, json_schema_extra={"changes": declared})


def changes_of(section: type[BaseModel]) -> dict[str, Changes]:
    """What each key of a section changes. Raises TypeError for a key that does not declare it."""
    return {key: _declared(section, key) for key in section.model_fields}


def _declared(section: type[BaseModel], key: str) -> Changes:
    extra: Any = section.model_fields[key].json_schema_extra
    declared = extra.get("changes") if isinstance(extra, Mapping) else None
    if not isinstance(declared, list) or not declared:
        raise TypeError(f"{section.__name__}.{key} does not declare what it changes: make it with setting()")
    found = [Changes(**one) for one in declared]
    outcome = getattr(section, "outcome", None)
    own = (one for one in found if len(found) == 1 or one.effect == outcome)
    return next(own, NOTHING)
