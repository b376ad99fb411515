"""The promoted model: one alias under `models/`, moved at once or not at all, with its history.

`promoted.json` names the model and says why; it is the truth. `promotions.jsonl` has a line for each change. A
process that dies between the two leaves a pointer whose line is missing; the next change adds it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from tasks.core.errors import ModelLoadError, PromotionError, StorageError, first_line
from tasks.core.evaluation.summary import ChampionPoint, ScoreInterval, Verdict
from tasks.core.files import write_atomically
from tasks.core.models import registry
from tasks.core.models.digests import weights_sha256
from tasks.core.records import Record

POINTER_NAME = f"{registry.PROMOTED}.json"
HISTORY_NAME = "promotions.jsonl"
_LOCK_SECONDS = 10.0


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
    """One line of `models/promotions.jsonl`. `promotion` is what holds from then on."""

    action: Literal["promote", "rollback"]
    at: str | None
    by: str | None
    reason: str | None
    replaced: str | None
    promotion: Promotion


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes the alias, and why in their own words."""

    name: str
    reason: str | None = None


def current_promotion(models_dir: Path) -> Promotion | None:
    """The promotion in force; None when nothing is promoted. ModelLoadError when the pointer is damaged."""
    name = registry.promoted_run(models_dir)
    pointer_path = models_dir / POINTER_NAME
    if name is None or not pointer_path.is_file():
        return None if name is None else Promotion(run_name=name)  # a link that a person made
    try:
        return Promotion.model_validate_json(pointer_path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelLoadError(
            f"{pointer_path} is damaged: {first_line(error)}",
            "promote a model again with --force, or delete the file",
        ) from error


def promotion_history(models_dir: Path) -> list[HistoryEntry]:
    """All changes of the alias, oldest first; lines that a dying process tore are left out."""
    entries = []
    try:
        lines = (models_dir / HISTORY_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entries.append(HistoryEntry.model_validate_json(line))
        except ValidationError:
            continue
    return entries


def champions(models_dir: Path) -> list[ChampionPoint]:
    """The models that were promoted or went back to, oldest first, not yet scored on any rows.

    The last is the one in force, also where a person wrote the pointer.
    """
    line = [(entry.promotion, entry.at) for entry in promotion_history(models_dir)]
    present = current_promotion(models_dir)
    if present is not None and (not line or line[-1][0].run_name != present.run_name):
        line.append((present, present.promoted_at))
    return [
        ChampionPoint(run_name=one.run_name, promoted_at=at, weights_sha256=one.weights_sha256)
        for one, at in line
    ]


def why_not(models_dir: Path, run_name: str, evidence: Evidence | None) -> str | None:
    """Why a model may not be promoted on this evidence; None when it may."""
    if evidence is None or evidence.verdict is None:
        return f"{run_name} was not compared with any model, so there is no verdict"
    verdict = evidence.verdict
    if verdict.decision != "promote":
        return f"the verdict about {run_name} is {verdict.decision}: {verdict.reasons[0]}"
    if evidence.weights_sha256 not in (None, weights_sha256(registry.model_dir(models_dir, run_name))):
        return f"the files of {run_name} have changed since its evaluation"
    champion = registry.promoted_run(models_dir)
    if champion is not None and champion not in (run_name, evidence.champion):
        compared = evidence.champion or "no champion"
        return f"the verdict about {run_name} compares it with {compared}, but the champion is {champion} now"
    return None


def promote(
    models_dir: Path, run_name: str, actor: Actor, evidence: Evidence | None, *, force: bool = False
) -> Promotion:
    """Make a model the promoted one and record why; gives the promotion in force when it is that model's already.

    Raises PromotionError when the evidence does not allow it (unless `force`, which needs a reason), when the
    model is not complete, or when another promotion is going on; StorageError when a file cannot be written.
    """
    directory = registry.model_dir(models_dir, run_name)
    _require_complete(directory)
    if force and not actor.reason:
        raise PromotionError(
            "a promotion that the verdict does not support needs a reason", "add --reason TEXT"
        )
    with _locked(models_dir):
        previous, digest = _settled(models_dir, tolerant=force), weights_sha256(directory)
        if previous is not None and (previous.run_name, previous.weights_sha256) == (run_name, digest):
            return previous
        refusal = _refusal(models_dir, run_name, evidence, tolerant=force)
        if refusal is not None and not force:
            raise PromotionError(
                refusal,
                "look at its report, evaluate again where something changed, or "
                f"`tuneproof promote {run_name} --force --reason TEXT`",
            )
        promotion = Promotion(
            run_name=run_name,
            promotion_id=secrets.token_hex(8),
            promoted_at=_now(),
            promoted_by=actor.name,
            reason=actor.reason,
            forced=refusal is not None,
            weights_sha256=digest,
            evidence=evidence,
        )
        _move(models_dir, promotion, "promote", actor, previous)
        return promotion


def _refusal(models_dir: Path, run_name: str, evidence: Evidence | None, *, tolerant: bool) -> str | None:
    """See why_not; of a damaged pointer nobody can say what the verdict should have been against."""
    try:
        return why_not(models_dir, run_name, evidence)
    except ModelLoadError as error:
        if tolerant:
            return error.what
        raise


def roll_back(models_dir: Path, actor: Actor) -> tuple[Promotion, Promotion]:
    """Go back to the model that was promoted before; gives that promotion and the one it replaces.

    Raises PromotionError when there is none, or when its files are gone or changed.
    """
    with _locked(models_dir):
        present = _settled(models_dir)
        if present is None:
            raise PromotionError(
                f"nothing is promoted in {models_dir}", "promote a model first: `tuneproof promote RUN`"
            )
        before = _in_force(promotion_history(models_dir))[:-1]
        if not before:
            raise PromotionError(
                f"{present.run_name} is the first promoted model: there is none to go back to",
                "promote another one: `tuneproof promote RUN`; `tuneproof models --history` lists what was done",
            )
        target = before[-1]
        directory = registry.model_dir(models_dir, target.run_name)
        _require_complete(directory)
        if target.weights_sha256 not in (None, weights_sha256(directory)):
            raise PromotionError(
                f"the files of {target.run_name} have changed since it was promoted",
                f"evaluate it again, or `tuneproof promote {target.run_name} --force --reason TEXT`",
            )
        _move(models_dir, target, "rollback", actor, present)
        return target, present


def _require_complete(directory: Path) -> None:
    reason = registry.why_incomplete(directory) if directory.is_dir() else "there is no such directory"
    if reason is not None:
        raise PromotionError(
            f"{directory} cannot be promoted: {reason}", "`tuneproof models` lists what is there"
        )


def _in_force(entries: list[HistoryEntry]) -> list[Promotion]:
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


def _settled(models_dir: Path, *, tolerant: bool = False) -> Promotion | None:
    """The promotion in force, with its line in the history if that was missing."""
    try:
        present = current_promotion(models_dir)
    except ModelLoadError:
        if tolerant:
            return None
        raise
    entries = promotion_history(models_dir)
    if present is not None and (not entries or entries[-1].promotion != present):
        went_back = present in _in_force(entries)[:-1]
        actor = Actor(present.promoted_by or "unknown", "the line was missing")
        _append(models_dir, _entry("rollback" if went_back else "promote", present, actor, None))
    return present


def _move(
    models_dir: Path,
    promotion: Promotion,
    action: Literal["promote", "rollback"],
    actor: Actor,
    replaced: Promotion | None,
) -> None:
    write_atomically(models_dir / POINTER_NAME, promotion.model_dump_json(indent=2) + "\n")
    _append(models_dir, _entry(action, promotion, actor, replaced))


def _entry(
    action: Literal["promote", "rollback"], promotion: Promotion, actor: Actor, replaced: Promotion | None
) -> HistoryEntry:
    name = None if replaced is None else replaced.run_name
    return HistoryEntry(
        action=action, at=_now(), by=actor.name, reason=actor.reason, replaced=name, promotion=promotion
    )


def _append(models_dir: Path, entry: HistoryEntry) -> None:
    path = models_dir / HISTORY_NAME
    try:
        with path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + entry.model_dump_json().encode() + b"\n")
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}", "free some space"
        ) from error


@contextmanager
def _locked(models_dir: Path) -> Iterator[None]:
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(models_dir / ".promotion.lock", timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise PromotionError(
            f"another promotion in {models_dir} is going on", "try again when it has ended"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
