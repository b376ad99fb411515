"""Promotion: which model may become the champion, on what evidence, and the way back.

The files and the order in which they are written are those of `alias`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import ValidationError

from tasks.core.errors import ModelLoadError, PromotionError, first_line
from tasks.core.evaluation.summary import ChampionPoint, ScoreInterval, Verdict
from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained import history, registry
from tasks.core.models.trained.alias import (
    Line,
    alias_files,
    forget_mark,
    locked,
    move,
    read_line,
    settled,
)
from tasks.core.models.trained.alias_files import HISTORY_NAME, POINTER_NAME, Mark
from tasks.core.models.trained.champion import Champion, champion_in, current_champion, why_changed
from tasks.core.models.trained.folders import address_of, folder_of, missing_there
from tasks.core.provenance import now
from tasks.core.records import Record
from tasks.core.run_names import why_no_name
from tasks.core.storage.store import Store, as_store

logger = logging.getLogger(__name__)


class PromotedScore(Record):
    """A figure of the promoted model, and the opponent's."""

    metric: str
    value: float | None
    interval: ScoreInterval | None
    opponent_value: float | None


class Evidence(Record):
    """The evaluation that a promotion rests on."""

    run_name: str
    run_key: str | None
    weights_sha256: str | None
    opponent_run_name: str | None
    opponent_run_key: str | None
    champion: str | None
    dataset_id: str | None
    dataset_split: str | None
    rows: int
    scores: tuple[PromotedScore, ...]
    verdict: Verdict | None
    evaluated_at: str
    summary_path: str


class Promotion(Record):
    """`models/promoted.json`: the model in use, since when, by whom and why."""

    format: Literal[1] = 1
    run_name: str
    promotion_id: str = ""
    promoted_at: str | None = None
    promoted_by: str | None = None
    reason: str | None = None
    forced: bool = False
    weights_sha256: str | None = None
    evidence: Evidence | None = None


class HistoryEntry(Record):
    """One line of `models/promotions.jsonl`. `promotion` is what holds from then on.

    `previous` is the sha256 of the line before; None in the first line, and in those of earlier versions.
    """

    action: Literal["promote", "rollback"]
    at: str | None
    by: str | None
    reason: str | None
    replaced: str | None
    promotion: Promotion
    change_id: str = ""
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes the alias, and why in their own words."""

    name: str
    reason: str | None = None

    def __post_init__(self) -> None:
        """Bytes of a command line that are no UTF-8 could not be written down."""
        for field in ("name", "reason"):
            text = getattr(self, field)
            if text is not None:
                object.__setattr__(self, field, text.encode("utf-8", "replace").decode())


Tell = Callable[[Promotion, Promotion, bool], None]
"""Told of a rollback before it counts as told: the promotion that holds, the one it replaces, whether it had been
cut off and was only finished."""


def current_promotion(models: Store | Path) -> Promotion | None:
    """The promotion in force; None when nothing is promoted.

    Raises ModelLoadError when the pointer or the history is damaged or missing, or when they disagree.
    """
    champion = current_champion(models)
    if champion is None:
        return None
    return _promotion_in(models, read_line(models)) or Promotion(run_name=champion.run_name)


def _promotion_in(models: Store | Path, line: Line) -> Promotion | None:
    """The promotion that the pointer, or a decided change that waits for it, holds; None for a link made by hand."""
    content = line.decided if line.waits_for_pointer else line.pointer
    if content is None:
        return None
    try:
        return Promotion.model_validate(content, strict=False)
    except ValidationError as error:
        raise ModelLoadError(
            f"{alias_files(models).address(POINTER_NAME)} is damaged: {first_line(error)}",
            "put the file back from a copy, or promote a model again with --force",
        ) from error


def promotion_history(models: Store | Path) -> list[HistoryEntry]:
    """All changes of the alias, oldest first. Raises ModelLoadError that names a damaged line."""
    files = alias_files(models)
    address = files.address(HISTORY_NAME)
    return _entries(address, history.parsed_history(address, files.read(HISTORY_NAME).content or b""))


def _entries(address: str, found: history.History) -> list[HistoryEntry]:
    entries = []
    for change in found.changes:
        try:
            entries.append(HistoryEntry.model_validate_json(change.line))
        except ValidationError as error:
            raise history.damaged(address, change.number, first_line(error)) from error
    return entries


def champions(models: Store | Path) -> list[ChampionPoint]:
    """The models that were promoted or went back to, oldest first, not yet scored on any rows.

    The last is the one in force, also where a person wrote the pointer.
    """
    present = current_promotion(models)
    line = [(entry.promotion, entry.at) for entry in promotion_history(models)]
    if present is not None and not line:
        line.append((present, present.promoted_at))  # a person wrote the pointer
    return [
        ChampionPoint(run_name=one.run_name, promoted_at=at, weights_sha256=one.weights_sha256)
        for one, at in line
    ]


def why_not(
    models: Store | Path, run_name: str, evidence: Evidence | None, champion: Champion | None
) -> str | None:
    """Why a model may not take the champion's place on this evidence; None when it may."""
    if evidence is None or evidence.verdict is None:
        return f"{run_name} was not compared with any model, so there is no verdict"
    verdict = evidence.verdict
    if verdict.decision != "promote":
        return f"the verdict about {run_name} is {verdict.decision}: {verdict.reasons[0]}"
    if evidence.weights_sha256 not in (None, weights_sha256(_model_dir(models, run_name))):
        return f"the files of {run_name} have changed since its evaluation"
    if champion is None or champion.run_name == run_name:
        return None
    if champion.run_name != evidence.champion:
        compared = evidence.champion or "no champion"
        return f"the verdict about {run_name} compares it with {compared}, but the champion is {champion.run_name} now"
    return why_changed(models, champion)


def new_promotion_id() -> str:
    """Return an id that no promotion has."""
    return secrets.token_hex(8)


def promote(
    models: Store | Path,
    run_name: str,
    actor: Actor,
    evidence: Evidence | None,
    *,
    force: bool = False,
    promotion_id: str | None = None,
) -> Promotion:
    """Make a model the promoted one and record why; gives the promotion in force when it is that model's already.

    A new promotion has the `promotion_id` that is given, so that who gives one can tell whether this call made it.

    Raises PromotionError when the evidence does not allow it (unless `force`, which needs a reason), when the
    model is not complete, or when another promotion is going on; StorageError when a file cannot be written.
    """
    directory = _model_dir(models, run_name)
    _require_complete(models, directory)
    if force and not actor.reason:
        raise PromotionError(
            "a promotion that the verdict does not support needs a reason", "add --reason TEXT"
        )
    with locked(models):
        state, digest = _state(models, tolerant=force), weights_sha256(directory)
        present = state.present
        if present is not None and (present.run_name, present.weights_sha256) == (run_name, digest):
            forget_mark(models, state.line.mark)
            return present
        champion = None if present is None else Champion(present.run_name, present.weights_sha256)
        refusal = state.damage or why_not(models, run_name, evidence, champion)
        if refusal is not None and not force:
            raise PromotionError(
                refusal,
                "look at its report, evaluate again where something changed, or "
                f"`tuneproof promote {run_name} --force --reason TEXT`",
            )
        promotion = Promotion(
            run_name=run_name,
            promotion_id=promotion_id or new_promotion_id(),
            promoted_at=now(),
            promoted_by=actor.name,
            reason=actor.reason,
            forced=refusal is not None,
            weights_sha256=digest,
            evidence=evidence,
        )
        if state.damage is not None:
            logger.warning("%s; %s is promoted all the same, as --force asks", state.damage, run_name)
        line = _with_hand_made(models, state)
        forget_mark(models, _move(models, line, promotion, "promote", actor))
        return promotion


def roll_back(models: Store | Path, actor: Actor, tell: Tell | None = None) -> tuple[Promotion, Promotion]:
    """Go back to the model that was promoted before; gives that promotion and the one it replaces.

    A rollback that went its step and was cut off before it was told is told now, and no further step is taken.
    Raises PromotionError when there is none to go back to, or when its files are gone or changed; ModelLoadError when
    pointer and history are damaged or disagree.
    """
    with locked(models):
        state = _state(models)
        if state.present is None:
            raise PromotionError(
                f"nothing is promoted in {as_store(models).place}",
                "promote a model first: `tuneproof promote RUN`",
            )
        entries = _entries(alias_files(models).address(HISTORY_NAME), state.line.history)
        mark = untold = state.line.untold
        was_cut_off = untold is not None and untold.action == "rollback"
        if was_cut_off:
            target, replaced = state.present, entries[-2].promotion
            logger.warning("an earlier rollback was cut off after its step: no further one is taken")
        else:
            target, replaced = _before(models, state.present, entries), state.present
            mark = _move(models, state.line, target, "rollback", actor)
        if tell is not None:
            tell(target, replaced, was_cut_off)
        forget_mark(models, mark)
        return target, replaced


def _before(models: Store | Path, present: Promotion, entries: list[HistoryEntry]) -> Promotion:
    """The promotion to go back to, whose files are there and unchanged; PromotionError without one."""
    before = in_force(entries)[:-1]
    if not before:
        raise PromotionError(
            f"{present.run_name} is the first promoted model: there is none to go back to",
            "promote another one: `tuneproof promote RUN`; `tuneproof models --history` lists what was done",
        )
    target = before[-1]
    directory = _model_dir(models, target.run_name)
    _require_complete(models, directory)
    if target.weights_sha256 not in (None, weights_sha256(directory)):
        raise PromotionError(
            f"the files of {target.run_name} have changed since it was promoted",
            f"evaluate it again, or `tuneproof promote {target.run_name} --force --reason TEXT`",
        )
    return target


def _model_dir(models: Store | Path, run_name: str) -> Path:
    """The folder of a model, whose name leads nowhere else; brought here from a URL."""
    directory = registry.model_dir(as_store(models).local, run_name)
    return folder_of(models, run_name) if as_store(models).is_remote else directory


def _require_complete(models: Store | Path, directory: Path) -> None:
    reason = registry.why_incomplete(directory) if directory.is_dir() else "there is no such directory"
    if reason is None and (missing := missing_there(models, directory.name)):
        reason = f"{missing[0]} was not sent there; the same training command sends the rest"
    if reason is not None:
        raise PromotionError(
            f"{address_of(models, directory.name)} cannot be promoted: {reason}",
            "`tuneproof models` lists what is there",
        )


def in_force(entries: list[HistoryEntry]) -> list[Promotion]:
    """The promotions that a rollback may go back to, oldest first; the last is in force."""
    stack: list[Promotion] = []
    for entry in entries:
        if entry.action == "rollback":
            while stack and not _same_model(stack[-1], entry.promotion):
                stack.pop()
        else:
            # A model in place of itself, as after a damaged pointer, is no step that a rollback takes back.
            if stack and _same_model(stack[-1], entry.promotion):
                stack.pop()
            stack.append(entry.promotion)
    return stack


def _same_model(one: Promotion, other: Promotion) -> bool:
    return (one.run_name, one.weights_sha256) == (other.run_name, other.weights_sha256)


@dataclass(frozen=True, slots=True)
class _State:
    """What holds before a change; `damage` says what is wrong with pointer or history, if a person overrides that."""

    line: Line
    present: Promotion | None
    damage: str | None = None


def _state(models: Store | Path, *, tolerant: bool = False) -> _State:
    """Finish what was cut off and read what holds; call it with the lock held.

    `tolerant` passes over a pointer or history that is damaged, where else ModelLoadError is raised.
    """
    address = alias_files(models).address(HISTORY_NAME)
    try:
        line = settled(models)
        _entries(address, line.history)
        champion, present = champion_in(models, line), _promotion_in(models, line)
        if present is None and champion is not None:
            present = Promotion(run_name=champion.run_name)  # a link that a person made
        return _State(line, present)
    except ModelLoadError as error:
        if not tolerant:
            raise
        line = read_line(models, tolerant=True)
        try:
            is_damaged = line.is_damaged or _lacks_pointer(line)
            _entries(address, line.history)
        except ModelLoadError:
            is_damaged = True
        if is_damaged:
            line = replace(line, history=history.History(), is_damaged=True)
        return _State(line, None, error.what)


def _lacks_pointer(line: Line) -> bool:
    """Whether the pointer names a promotion that the history has no line for: its last lines are gone."""
    own = (line.pointer or {}).get("promotion_id")
    return bool(own) and all(change.promotion.get("promotion_id") != own for change in line.history.changes)


def _with_hand_made(models: Store | Path, state: _State) -> Line:
    """The line, to which a promotion by hand (a pointer or link without history) is added as its first change."""
    present = state.present
    if present is None or state.line.decided is not None or why_no_name(present.run_name) is not None:
        return state.line
    _move(models, state.line, present, "promote", Actor("unknown", "named by hand"))
    return read_line(models)


def _move(
    models: Store | Path,
    line: Line,
    promotion: Promotion,
    action: Literal["promote", "rollback"],
    actor: Actor,
) -> Mark:
    in_place_of = line.pointer or line.decided
    entry = HistoryEntry(
        action=action,
        at=now(),
        by=actor.name,
        reason=actor.reason,
        replaced=None if in_place_of is None else in_place_of["run_name"],
        promotion=promotion,
    )
    written: dict[str, Any] = orjson.loads(entry.model_dump_json())
    return move(models, line, written)
