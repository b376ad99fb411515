"""What the gate looks at: each check compares one figure with one limit and tells it in a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError
from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.gate.evidence_checks import RATE_OF_METRIC, evidence_checks, rate_rises
from tasks.core.evaluation.gate.origin_checks import check, judged_check, may_decide, origin_checks
from tasks.core.evaluation.summary import (
    GateCheck,
    MetricComparison,
    Opponent,
    RunSummary,
    WorstCase,
)
from tasks.core.evaluation.wording import is_share, label, percent, shown, shown_difference
from tasks.core.metrics.metric import Metric

if TYPE_CHECKING:
    from tasks.core.config import GateConfig
    from tasks.core.evaluation.gate.inputs import GateInputs

_NAMES: dict[Opponent, str] = {"base": "the base model", "champion": "the champion", "run": "the baseline"}


_MUCH_LONGER, _SHORT_CHARACTERS = 2.5, 40


@dataclass(frozen=True, slots=True)
class Finding:
    """A check, and whether its failure speaks against the model (rejects) or only against the evidence."""

    check: GateCheck
    rejects: bool = False


class Checks:
    """The checks of one gate; `findings` gives them all."""

    def __init__(self, inputs: GateInputs, primary: Metric, settings: GateConfig) -> None:
        self._in, self._settings = inputs, settings
        self._alpha = 1 - inputs.confidence
        challenge = inputs.challenge
        self._allowed = self._alpha if challenge is None else min(self._alpha, challenge.allowed_p_value)
        self._opponent = _NAMES[inputs.against]
        compared = inputs.comparison.metric(primary.name)
        if compared is None:
            raise EvaluationError(
                f"the metric {primary.name} was not computed for both runs", "evaluate again"
            )
        self._primary = compared
        self._guards = list(self._guard_comparisons())

    def findings(self) -> list[Finding]:
        """All checks, the weightiest first."""
        rises = rate_rises(self._in, self._settings, self._watched_rates())
        p_values = [
            self._worse_p_value(),
            *(self._fall_p_value(guard) for guard in self._guards),
            *(rise.beyond_p_value for rise in rises),
        ]
        adjusted = stats.holm(p_values)
        found = [Finding(self._primary_check(adjusted[0]), rejects=may_decide(self._in, self._primary.name))]
        guards = adjusted[1 : 1 + len(self._guards)]
        found += [
            Finding(self._guard_check(guard, p), rejects=may_decide(self._in, guard.name))
            for guard, p in zip(self._guards, guards, strict=True)
        ]
        found += [
            Finding(rise.check(p <= self._alpha, self._opponent), rejects=True)
            for rise, p in zip(rises, adjusted[1 + len(self._guards) :], strict=True)
        ]
        found.append(self._errors_check())
        evidence = (
            *evidence_checks(self._in, self._settings, self._primary, self._guards),
            self._effect_check(),
            self._noise_check(),
            judged_check(self._in, [self._primary.name, *(guard.name for guard in self._guards)]),
            *origin_checks(self._in, self._settings),
        )
        return found + [Finding(looked_at) for looked_at in evidence if looked_at is not None]

    def notes(self) -> Iterator[str]:
        """What a reader should know besides: what fell though nobody guards it, and rows that are used up."""
        guarded = {self._primary.name, *(guard.name for guard in self._guards)}
        for compared in self._in.comparison.metrics:
            if compared.name not in guarded and compared.better == "baseline":
                yield f"{label(compared.name)} falls, and is no guard (gate.guard_metrics): {self._figures(compared)}."
        mine, theirs = self._in.comparison.candidate_characters, self._in.comparison.baseline_characters
        if mine is not None and theirs is not None and mine > _MUCH_LONGER * max(theirs, _SHORT_CHARACTERS):
            yield (
                f"The candidate's answers are much longer: {mine:,.0f} characters on average against {theirs:,.0f}. "
                "Metrics that look for something in an answer, and judges, may favour length: read some rows."
            )
        challenge = self._in.challenge
        if challenge is not None and challenge.number > challenge.challenges:
            yield (
                f"These rows are used up: {challenge.number - 1:,} candidates challenged {self._opponent} on them "
                "before. Take fresh test rows."
            )

    def _watched_rates(self) -> set[str]:
        """Rates that no guard proves already."""
        return set(RATE_OF_METRIC.values()) - {
            RATE_OF_METRIC[guard.name] for guard in self._guards if guard.name in RATE_OF_METRIC
        }

    # --- the figures

    def _guard_comparisons(self) -> Iterator[MetricComparison]:
        for compared in self._in.comparison.metrics:
            if compared.name == self._primary.name or compared.direction == "none":
                continue
            wanted = self._settings.guard_metrics
            if compared.name in wanted if wanted != "others" else self._is_share(compared):
                yield compared

    def _is_share(self, compared: MetricComparison) -> bool:
        metric = self._in.candidate.metric(compared.name)
        return metric is not None and is_share(metric.minimum, metric.maximum)

    def _gain(self, compared: MetricComparison) -> float:
        """How much better the candidate is; negative = worse."""
        return _sign(compared) * (compared.difference or 0.0)

    def _worse_p_value(self) -> float:
        primary = self._primary
        return 1.0 if primary.p_value is None or self._gain(primary) >= 0 else primary.p_value

    def _margin(self, compared: MetricComparison) -> float:
        margin = self._settings.non_inferiority_margin
        return margin if self._is_share(compared) else margin * abs(compared.baseline or 0.0)

    def _fall_p_value(self, guard: MetricComparison) -> float:
        fall, margin = -self._gain(guard), self._margin(guard)
        if guard.difference is None:
            return 1.0
        if guard.standard_error:
            return stats.fall_p_value(fall, guard.standard_error, margin)
        return stats.constant_fall_p_value(fall, margin, guard.clusters, self._reach(guard))

    def _reach(self, compared: MetricComparison) -> float:
        metric = self._in.candidate.metric(compared.name)
        return math.inf if metric is None or metric.maximum is None else metric.maximum - metric.minimum

    # --- the checks

    def _primary_check(self, worse_p_value: float) -> GateCheck:
        primary, gain = self._primary, self._gain(self._primary)
        name = f"{label(primary.name)} is the primary metric"
        if primary.difference is None or primary.p_value is None:
            return check(name, "undecided", f"{label(primary.name)} could not be compared on any row.")
        figures = self._figures(primary) + f", {_p_in_words(primary.p_value)}"
        if is_same_model(self._in.candidate, self._in.opponent):
            return check(name, "undecided", f"Both runs are answers of the same model; {figures}.")
        if gain < 0 and worse_p_value <= self._alpha and -gain > (self._in.noise.value or 0.0):
            return check(name, "failed", f"The candidate is worse than {self._opponent}: {figures}.")
        if gain <= 0 or primary.p_value > self._alpha:
            told = f"No difference from {self._opponent} can be shown: {figures}."
            return check(name, "undecided", " ".join([told, *self._rows_needed(primary)]))
        if primary.p_value > self._allowed:
            told = f"The gain over {self._opponent} is not sure enough after so many challenges: {figures}."
            return check(name, "undecided", " ".join([told, *self._challenge(), *self._rows_needed(primary)]))
        worst = primary.worst_case
        if worst is not None and not self._holds(primary, worst):
            return check(name, "undecided", f"{self._worst_in_words(primary, worst)} Otherwise: {figures}.")
        told = f"The candidate is better than {self._opponent}: {figures}."
        return check(name, "passed", " ".join([told, *self._challenge()]))

    def _holds(self, primary: MetricComparison, worst: WorstCase) -> bool:
        """Whether the candidate is better still, with its rows that failed or are unscored at their worst."""
        better = worst.difference is not None and _sign(primary) * worst.difference > 0
        return better and worst.p_value is not None and worst.p_value <= self._allowed

    def _worst_in_words(self, primary: MetricComparison, worst: WorstCase) -> str:
        share = self._is_share(primary)
        found = f"{_signed(worst.difference or 0.0, share)}, {_p_in_words(worst.p_value or 1.0)}"
        return (
            f"{worst.rows - primary.rows:,} rows of the candidate failed or have no score where {self._opponent} has "
            f"one; if they count as its worst, it is not surely better ({found})."
        )

    def _challenge(self) -> Iterator[str]:
        """Which challenge this is, and what a gain found in this way is worth."""
        challenge = self._in.challenge
        if challenge is None:
            return
        if challenge.allowed_p_value < self._alpha:
            yield (
                f"This is challenge {challenge.number:,} of {self._opponent} on these rows: "
                f"p must be at most {challenge.allowed_p_value:.2g}."
            )
        if challenge.expected_difference is not None:
            expected = _signed(challenge.expected_difference, self._is_share(self._primary))
            yield f"On fresh rows expect about {expected}."

    def _rows_needed(self, compared: MetricComparison) -> Iterator[str]:
        effect, gain = compared.minimum_detectable_effect, abs(compared.difference or 0.0)
        if effect is None:
            return
        effect *= stats.detectable_ratio(self._allowed, self._alpha)
        share = self._is_share(compared)
        yield (
            f"{compared.rows:,} rows show a true difference of {_amount(effect, share)} in 4 of 5 cases"
            + (
                f"; for one as small as this about {_round_up(compared.rows * (effect / gain) ** 2):,} rows are needed."
                if gain > 0
                else "."
            )
        )

    def _guard_check(self, guard: MetricComparison, fall_p_value: float) -> GateCheck:
        share, margin = self._is_share(guard), self._margin(guard)
        name, allowed = f"{label(guard.name)} does not fall", _amount(margin, share)
        if guard.difference is None:
            return check(name, "undecided", f"{label(guard.name)} could not be compared on any row.")
        figures = self._figures(guard)
        # A corpus figure can fall although no row does: rows that score 0 as before, at greater length.
        if guard.losses == 0 and self._gain(guard) >= 0 and guard.worst_case is None:
            return check(name, "passed", f"No row is worse by {label(guard.name)}: {figures}.")
        if fall_p_value <= self._alpha:
            return check(
                name, "failed", f"{label(guard.name)} falls by more than the allowed {allowed}: {figures}."
            )
        lowest = self._lowest_gain(guard)
        if lowest > -margin:
            told = "does not fall" if lowest >= 0 else f"falls by less than {allowed}, if at all"
            return check(name, "passed", f"{label(guard.name)} {told}: {figures}.")
        told = f"{label(guard.name)} may have fallen by more than the allowed {allowed}: {figures}."
        return check(name, "undecided", " ".join([told, *self._guard_rows_needed(guard, margin)]))

    def _guard_rows_needed(self, guard: MetricComparison, margin: float) -> Iterator[str]:
        effect = guard.minimum_detectable_effect
        if effect is not None and margin > 0:
            needed = _round_up(guard.rows * (effect / margin) ** 2)
            yield f"Where it does not fall, about {needed:,} rows show so in 4 of 5 cases."

    def _lowest_gain(self, compared: MetricComparison) -> float:
        """Lower end of the gain's interval, also when rows without a score count as the candidate's worst."""
        interval, worst = compared.interval, compared.worst_case
        if interval is None:
            return -math.inf
        lowest = interval.low if _sign(compared) > 0 else -interval.high
        if worst is None or worst.difference is None or worst.standard_error is None:
            return lowest
        reach = stats.normal_quantile(1 - self._alpha / 2) * worst.standard_error
        return min(lowest, _sign(compared) * worst.difference - reach)

    def _errors_check(self) -> Finding:
        allowed, name = self._settings.maximum_error_rate, "Few rows with errors"
        mine, theirs = (run.error_rows / run.rows for run in (self._in.candidate, self._in.opponent))
        told = f"{self._in.candidate.error_rows:,} of {self._in.candidate.rows:,} rows have an error"
        others = f"{self._in.opponent.error_rows:,} of {self._opponent}'s {self._in.opponent.rows:,}"
        if max(mine, theirs) <= allowed:
            return Finding(check(name, "passed", f"{told}; {percent(allowed)} are allowed."))
        if theirs >= mine:
            told += f", and {others}; {percent(allowed)} are allowed: look at the data and the machine."
            return Finding(check(name, "undecided", told))
        return Finding(check(name, "failed", f"{told}; {percent(allowed)} are allowed."), rejects=True)

    def _effect_check(self) -> GateCheck | None:
        least, gain = self._settings.minimum_effect, self._gain(self._primary)
        if least == 0:
            return None
        share = self._is_share(self._primary)
        told = (
            f"The gain is {_signed(gain, share)}; less than {_amount(least, share)} is not worth a promotion."
        )
        return check("The gain is worth it", "passed" if gain >= least else "undecided", told)

    def _noise_check(self) -> GateCheck:
        noise, name = self._in.noise, "The difference is above the noise"
        if noise.value is None:
            return check(name, "skipped", f"The noise was not measured: {noise.reason}.")
        if noise.reason is not None:
            return check(name, "passed", f"There is no noise: {noise.reason}.")
        share = self._is_share(self._primary)
        told = (
            f"Answered again in other batches, {noise.changed} of {noise.rows} rows score differently, by "
            f"{_amount(noise.value, share)} on average"
        )
        effect = abs(self._gain(self._primary))
        if noise.value == 0 or effect > noise.value:
            return check(name, "passed", f"{told}.")
        return check(name, "undecided", f"{told}; the difference of {_amount(effect, share)} is no larger.")

    # --- words

    def _figures(self, compared: MetricComparison) -> str:
        share = self._is_share(compared)
        interval = compared.interval
        between = (
            f" ({percent(self._in.confidence)} interval {shown_difference(interval.low, share)} to "
            f"{shown_difference(interval.high, share)})"
            if interval
            else ""
        )
        return (
            f"{label(compared.name)} {shown(compared.candidate or 0.0, share)} against "
            f"{shown(compared.baseline or 0.0, share)}, {_signed(compared.difference or 0.0, share)}{between} "
            f"on {compared.rows:,} rows"
        )


def is_same_model(candidate: RunSummary, opponent: RunSummary) -> bool:
    """Whether both runs are answers of the same weights, loaded and asked in the same way."""
    mine, theirs = candidate.identity, opponent.identity
    return mine is not None and theirs is not None and mine.model.content() == theirs.model.content()


def _sign(compared: MetricComparison) -> int:
    return -1 if compared.direction == "lower" else 1


def _amount(value: float, share: bool) -> str:
    return shown(value, share) + (" points" if share else "")


def _signed(value: float, share: bool) -> str:
    return shown_difference(value, share) + (" points" if share else "")


def _p_in_words(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _round_up(rows: float) -> int:
    """Two significant digits, upwards: a planning figure, not a measurement."""
    if not math.isfinite(rows) or rows > 1e12:
        return 10**12
    step: int = 10 ** max(0, len(str(int(rows))) - 2)
    return math.ceil(rows / step) * step
