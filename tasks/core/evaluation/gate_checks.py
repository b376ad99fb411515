"""What the gate looks at: each check compares one figure with one limit and tells it in a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError
from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.metric import Metric
from tasks.core.evaluation.origin_checks import check, origin_checks
from tasks.core.evaluation.summary import GateCheck, MetricComparison, Opponent
from tasks.core.evaluation.wording import is_share, label, percent, shown, shown_difference

if TYPE_CHECKING:
    from tasks.core.config import GateConfig
    from tasks.core.evaluation.gate import GateInputs

_NAMES: dict[Opponent, str] = {"base": "the base model", "champion": "the champion", "run": "the baseline"}


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
        p_values = [self._worse_p_value(), *(self._fall_p_value(guard) for guard in self._guards)]
        adjusted = stats.holm(p_values)
        found = [Finding(self._primary_check(adjusted[0]), rejects=True)]
        found += [
            Finding(self._guard_check(guard, p), rejects=True)
            for guard, p in zip(self._guards, adjusted[1:], strict=True)
        ]
        found.append(self._errors_check())
        evidence = (
            *self._rows_checks(),
            self._effect_check(),
            self._noise_check(),
            *origin_checks(self._in, self._settings),
        )
        return found + [Finding(looked_at) for looked_at in evidence if looked_at is not None]

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
        if self._is_same_model():
            return check(name, "undecided", f"Both runs are answers of the same model; {figures}.")
        if gain > 0 and primary.p_value <= self._alpha:
            return check(name, "passed", f"The candidate is better than {self._opponent}: {figures}.")
        if gain < 0 and worse_p_value <= self._alpha and -gain > (self._in.noise.value or 0.0):
            return check(name, "failed", f"The candidate is worse than {self._opponent}: {figures}.")
        told = f"No difference from {self._opponent} can be shown: {figures}."
        return check(name, "undecided", " ".join([told, *self._rows_needed(primary)]))

    def _is_same_model(self) -> bool:
        mine, theirs = self._in.candidate.identity, self._in.opponent.identity
        return mine is not None and theirs is not None and mine.model.content() == theirs.model.content()

    def _rows_needed(self, compared: MetricComparison) -> Iterator[str]:
        effect, gain = compared.minimum_detectable_effect, abs(compared.difference or 0.0)
        if effect is None:
            return
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
        if guard.losses == 0 and self._gain(guard) >= 0:
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
        return check(name, "undecided", told)

    def _lowest_gain(self, compared: MetricComparison) -> float:
        interval = compared.interval
        if interval is None:
            return -math.inf
        return interval.low if _sign(compared) > 0 else -interval.high

    def _errors_check(self) -> Finding:
        allowed, name = self._settings.maximum_error_rate, "Few rows with errors"
        mine, theirs = (run.error_rows / run.rows for run in (self._in.candidate, self._in.opponent))
        told = f"{self._in.candidate.error_rows:,} of {self._in.candidate.rows:,} rows have an error"
        if mine <= allowed:
            return Finding(check(name, "passed", f"{told}; {percent(allowed)} are allowed."))
        if theirs >= mine:
            others = f"{self._in.opponent.error_rows:,} of {self._opponent}'s"
            told += f", and {others}: look at the data and the machine."
            return Finding(check(name, "undecided", told))
        return Finding(check(name, "failed", f"{told}; {percent(allowed)} are allowed."), rejects=True)

    def _rows_checks(self) -> Iterator[GateCheck]:
        least, found = self._settings.minimum_rows, self._primary.clusters
        told = f"{found:,} different questions are scored in both runs; at least {least:,} are asked for."
        yield check("Enough rows", "passed" if found >= least else "undecided", told)
        yield self._scored_check()

    def _scored_check(self) -> GateCheck:
        """Rows that fell out of the figures: the better or the worse ones of a run may be among them.

        A guard that neither run has for a row (its reference has no number, say) hides nothing; it is left out.
        """
        paired, primary = self._in.comparison.paired_rows, self._primary
        missing = {primary.name: (paired - primary.rows, "is missing")}
        missing |= {guard.name: (guard.one_sided_rows, "is missing in one run") for guard in self._guards}
        worst = max(missing, key=lambda name: missing[name][0])
        rows, how = missing[worst]
        allowed = self._settings.maximum_unscored_rate
        told = f"{label(worst)} {how} for {rows:,} of {paired:,} rows; {percent(allowed)} are allowed"
        if rows <= allowed * paired:
            return check("Enough rows scored", "passed", f"{told}.")
        return check(
            "Enough rows scored", "undecided", f"{told} (gate.maximum_unscored_rate); the report says why."
        )

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
