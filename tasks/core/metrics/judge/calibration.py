"""`judge_calibration.json`: how far judges agreed with people, and whether one may decide about models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from filelock import FileLock
from pydantic import ValidationError

from tasks.core.errors import EvaluationError
from tasks.core.files import cache_dir, write_atomically
from tasks.core.records import Record
from tasks.core.storage.store import Store, is_url

if TYPE_CHECKING:
    from tasks.core.config import EvaluatorConfig

CALIBRATION_NAME = "judge_calibration.json"
MOST_UNJUDGED = 0.1
"""Largest share of the labelled rows without a verdict: the judge may fail where it is hard."""


class JudgeCalibration(Record):
    """One judge compared with people on one metric.

    `judge` is what identifies it (model and address, or digests of a local model); `prompt_sha256` is the digest of
    what it is asked. `kappa` is weighted quadratically, `low` to `high` its 95 % interval, `rows` those with both label
    and verdict.
    """

    metric: str
    model: str
    endpoint: str | None
    judge: str
    prompt_sha256: str
    kappa: float | None
    low: float | None
    high: float | None
    plain_kappa: float | None
    agreement: float
    rows: int
    unjudged_rows: int
    labels_sha256: str
    at: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a calibration holds for."""
        return self.metric, self.judge, self.prompt_sha256


class _File(Record):
    format: int = 1
    calibrations: tuple[JudgeCalibration, ...] = ()


class JudgeStanding(Record):
    """Whether a judged metric may decide about a model; `told` says why in a sentence."""

    metric: str
    may_decide: bool
    told: str


@dataclass(frozen=True, slots=True)
class CalibrationBook:
    """Calibrations in a file or at a URL; the newest of each judge, metric and prompt."""

    store: Store
    name: str

    @classmethod
    def of(cls, config: EvaluatorConfig) -> CalibrationBook:
        """Where the settings keep them: `judge_calibration`, else beside the judge's replies."""
        place = config.judge_calibration
        if place is None:
            folder = (
                Path(config.judge_cache_dir).expanduser()
                if config.judge_cache_dir
                else cache_dir() / "verdicts"
            )
            return cls(Store(str(folder)), CALIBRATION_NAME)
        if is_url(place):
            folder_url, _, name = place.rpartition("/")
            return cls(Store(folder_url), name)
        path = Path(place).expanduser()
        return cls(Store(str(path.parent)), path.name)

    @property
    def address(self) -> str:
        """Path or URL of the file."""
        return self.store.address_of(self.name)

    def read(self) -> tuple[JudgeCalibration, ...]:
        """All calibrations. Raises EvaluationError when the file is damaged, StorageError when it is out of reach."""
        content = self.store.read(self.name)
        if content is None:
            return ()
        try:
            return _File.model_validate_json(content).calibrations
        except ValidationError as error:
            raise EvaluationError(
                f"{self.address} is damaged ({error.error_count()} problems)",
                "remove it and run `tuneproof judge calibrate` again",
            ) from error

    def add(self, new: Iterable[JudgeCalibration]) -> None:
        """Put calibrations in the place of earlier ones of the same judge, metric and prompt."""
        lock_dir = cache_dir() / "locks"
        lock_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_dir / "judge_calibration.lock"):
            kept = {one.key: one for one in (*self.read(), *new)}
            content = _File(calibrations=tuple(kept.values())).model_dump(mode="json")
            text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            if self.store.is_remote:
                self.store.write(self.name, text)
            else:
                self.store.local.mkdir(parents=True, exist_ok=True)
                write_atomically(self.store.local / self.name, text.decode())


def standing_of(
    metric: str,
    judge: str,
    prompt_sha256: str,
    calibrations: Iterable[JudgeCalibration],
    minimum_kappa: float,
) -> JudgeStanding:
    """Whether a judge may decide by a metric: the lower end of its kappa's interval must reach the minimum.

    The lower end, and not kappa itself: a few labels that happen to agree prove little.
    """
    if minimum_kappa == 0:
        told = "No agreement with people is asked of the judge (evaluator.judge_minimum_kappa = 0)."
        return JudgeStanding(metric=metric, may_decide=True, told=told)
    named = [one for one in calibrations if one.metric == metric]
    found = next((one for one in named if one.key == (metric, judge, prompt_sha256)), None)
    again = f"run `tuneproof judge calibrate LABELS.jsonl --metric {metric}` (docs/judge.md)"
    if found is None:
        other = "; those that are there are of another judge, model or prompt" if named else ""
        told = f"Nobody has compared this judge with people by {metric}{other}: {again}."
        return JudgeStanding(metric=metric, may_decide=False, told=told)
    if found.kappa is None or found.low is None or found.high is None:
        told = f"Kappa of {metric} cannot be told, as all {found.rows:,} labels are the same: {again} with others."
        return JudgeStanding(metric=metric, may_decide=False, told=told)
    unjudged, labelled = found.unjudged_rows, found.rows + found.unjudged_rows
    figures = f"kappa {found.kappa:.2f} ({found.low:.2f} to {found.high:.2f}, {found.rows:,} labels)"
    if unjudged > MOST_UNJUDGED * labelled:
        told = f"The judge had no verdict on {unjudged:,} of {labelled:,} labelled rows of {metric}: {again}."
        return JudgeStanding(metric=metric, may_decide=False, told=told)
    if found.low < minimum_kappa:
        told = (
            f"The judge is not shown to agree with people by {metric}: {figures}; the lower end must reach "
            f"{minimum_kappa:g} (evaluator.judge_minimum_kappa). Label more rows, or take another judge."
        )
        return JudgeStanding(metric=metric, may_decide=False, told=told)
    told = f"The judge agrees with people by {metric}: {figures}."
    return JudgeStanding(metric=metric, may_decide=True, told=told)
