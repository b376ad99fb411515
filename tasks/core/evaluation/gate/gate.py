"""The gate: from compared figures to promote, reject or inconclusive, with the reasons in words.

Promote needs every check to pass, those that are skipped aside (their detail says why), so each may use the full error
rate (an intersection-union test, Berger 1982) and the chance of promoting a model that is no better stays below it.
Reject needs one check to fail, so those p values are adjusted for their number (Holm 1979). Everything else is
inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.gate.case import GateInputs, NoiseFloor
from tasks.core.evaluation.gate.checks import case_of, findings, notes
from tasks.core.evaluation.gate.metric_checks import is_same_model
from tasks.core.evaluation.nights import ChallengeBook, challenge_of, look_at
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.evaluation.summary import (
    Challenge,
    ChampionPoint,
    Comparison,
    Decision,
    EvaluationSummary,
    Opponent,
    OverlapSummary,
    RunSummary,
    Verdict,
)
from tasks.core.metrics.metric import Metric
from tasks.core.records import ModelManifest

if TYPE_CHECKING:
    from tasks.core.config import GateConfig


@dataclass(frozen=True, slots=True)
class Gating:
    """What is asked of a candidate, and against whom.

    `baseline_kind` is what the baseline of the evaluation is. `champion_dir` is the champion's run where it is
    compared besides the baseline; `missing_champion` says why a champion that exists cannot be compared.
    `challenges` counts how often each was challenged. `champions` are all there were, oldest first, whose scores
    are looked for in `runs_dir`.
    """

    settings: GateConfig
    baseline_kind: Opponent = "base"
    champion_dir: Path | None = None
    missing_champion: str | None = None
    challenges: ChallengeBook | None = None
    champions: Sequence[ChampionPoint] = ()
    runs_dir: Path = Path("runs")


@dataclass(frozen=True, slots=True)
class Known:
    """What is known besides the figures. `overlap` is text where it could not be looked for."""

    primary: Metric
    table: ScoreTable
    noise: NoiseFloor
    overlap: OverlapSummary | str
    trained: ModelManifest | None


def primary_of(metrics: Sequence[Metric], settings: GateConfig) -> Metric | None:
    """The metric that decides; None when no metric has a better and a worse.

    Raises EvaluationError when the settings name metrics that are not computed or have no direction.
    """
    names = [metric.name for metric in metrics]
    named = [settings.primary_metric] if settings.primary_metric is not None else []
    named += [] if settings.guard_metrics == "others" else settings.guard_metrics
    for name in named:
        if name not in names:
            raise EvaluationError(
                f"[gate] names the metric {name!r}, which is not computed (computed: {', '.join(names)})",
                "add it to [evaluator] metrics, or name one that is there",
            )
    directed = [metric for metric in metrics if metric.direction != "none"]
    lost = set(named) - {metric.name for metric in directed}
    if lost:
        raise EvaluationError(
            f"[gate] names {', '.join(sorted(lost))}, which has no better and worse",
            "name a metric with a direction, such as exact_match",
        )
    chosen = (metric for metric in directed if settings.primary_metric in (None, metric.name))
    return next(chosen, None)


def decide(inputs: GateInputs, primary: Metric, settings: GateConfig) -> Verdict:
    """Reach the verdict; every check and its figures are in it."""
    case = case_of(inputs, primary, settings)
    found = findings(case)
    checks = tuple(finding.check for finding in found)
    rejecting = [one.check for one in found if one.rejects and one.check.outcome == "failed"]
    open_ones = [check for check in checks if check.outcome in ("failed", "undecided")]
    decision: Decision = "reject" if rejecting else "inconclusive" if open_ones else "promote"
    told = rejecting or open_ones or [checks[0], *(c for c in checks[1:] if c.outcome == "passed")]
    return Verdict(
        decision=decision,
        primary_metric=primary.name,
        against=inputs.against,
        against_run=inputs.opponent.run_name,
        reasons=tuple(check.detail for check in told),
        checks=checks,
        notes=tuple(notes(case)),
        missing_champion=inputs.missing_champion,
        challenge=inputs.challenge,
        noise_floor=inputs.noise.value,
        settings=settings.model_dump(mode="json"),
    )


def reach_verdict(summary: EvaluationSummary, gating: Gating, known: Known) -> Verdict | None:
    """Decide about an evaluated candidate: against the champion if one was compared, else against the baseline.

    None when nothing was compared.
    """
    against: Opponent = gating.baseline_kind if summary.champion is None else "champion"
    opponent = summary.champion or summary.baseline
    comparison = summary.champion_comparison or summary.comparison
    if opponent is None or comparison is None:
        return None
    identity, trained = summary.candidate.identity, known.trained
    same_template = None
    if identity is not None and trained is not None:
        same_template = identity.model.chat_template_sha256 == trained.chat_template_sha256
    inputs = GateInputs(
        candidate=summary.candidate,
        opponent=opponent,
        comparison=comparison,
        against=against,
        confidence=summary.settings.confidence,
        noise=known.noise,
        overlap=known.overlap,
        same_template=same_template,
        missing_champion=gating.missing_champion,
        challenge=_challenge(summary, opponent, comparison, against, gating, known),
        judges=summary.judges,
    )
    return decide(inputs, known.primary, gating.settings)


def _challenge(
    summary: EvaluationSummary,
    opponent: RunSummary,
    comparison: Comparison,
    against: Opponent,
    gating: Gating,
    known: Known,
) -> Challenge | None:
    """Enter this look into the book; None where there is none, or where a model is compared with itself."""
    compared = comparison.metric(known.primary.name)
    if gating.challenges is None or compared is None or is_same_model(summary.candidate, opponent):
        return None
    look = look_at(summary.candidate, opponent, compared, known.table)
    number, looks = gating.challenges.enter(look)
    return challenge_of(
        look,
        number,
        looks,
        challenges=gating.settings.challenges,
        confidence=summary.settings.confidence,
        against=against,
    )
