"""Checks of the scores: is the primary metric better, does no guard fall, is no watched rate higher?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from math import sqrt

from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.gate.case import (
    Case,
    Finding,
    Found,
    Tested,
    amount,
    check,
    gain,
    p_in_words,
    round_up,
    sign,
    signed,
)
from tasks.core.evaluation.summary import GateCheck, MetricComparison, RateComparison, RunSummary, WorstCase
from tasks.core.evaluation.wording import label, percent
from tasks.core.metrics.catalogue import known_metric

_RATES = {
    "empty": ("Empty answers do not become more", "answers are empty"),
    "cut": ("Cut answers do not become more", "answers were cut at the token limit"),
}


def primary_metric(case: Case) -> Found:
    """Whether the candidate is better by the metric that decides."""
    primary = case.primary
    is_worse = primary.p_value is not None and gain(primary) < 0

    def told(worse_p_value: float) -> Finding:
        return Finding(_primary(case, worse_p_value), rejects=case.may_decide(primary.name))

    yield Tested(primary.p_value if is_worse and primary.p_value is not None else 1.0, told)


def guards(case: Case) -> Found:
    """Whether other metrics do not fall."""

    def told(guard: MetricComparison, fall_p_value: float) -> Finding:
        return Finding(_guard(case, guard, fall_p_value), rejects=case.may_decide(guard.name))

    for guard in case.guards:
        yield Tested(_fall_p_value(case, guard), partial(told, guard))


def watched_rates(case: Case) -> Found:
    """Whether empty and cut answers do not become more, where no guard proves that already."""
    guarded = [metric.watched_rate for name in case.deciding[1:] if (metric := known_metric(name))]
    watched = _RATES.keys() - guarded
    rates = [rate for rate in case.inputs.comparison.rates if rate.name in watched]
    adjusted = stats.holm([rate.p_value if rate.rise > 0 else 1.0 for rate in rates])

    def told(rate: RateComparison, is_shown: bool, beyond_p_value: float) -> Finding:
        return Finding(_rate(case, rate, is_shown, beyond_p_value <= case.alpha), rejects=True)

    for rate, p_value in zip(rates, adjusted, strict=True):
        is_shown = rate.rise > 0 and p_value <= case.alpha
        yield Tested(_beyond_p_value(case, rate), partial(told, rate, is_shown))


# --- the primary metric


def _primary(case: Case, worse_p_value: float) -> GateCheck:
    primary = case.primary
    name = f"{label(primary.name)} is the primary metric"
    if primary.difference is None or primary.p_value is None:
        return check(name, "undecided", f"{label(primary.name)} could not be compared on any row.")
    figures = case.figures(primary) + f", {p_in_words(primary.p_value)}"
    if is_same_model(case.inputs.candidate, case.inputs.opponent):
        return check(name, "undecided", f"Both runs are answers of the same model; {figures}.")
    if (
        gain(primary) < 0
        and worse_p_value <= case.alpha
        and -gain(primary) > (case.inputs.noise.value or 0.0)
    ):
        return check(name, "failed", f"The candidate is worse than {case.opponent}: {figures}.")
    if gain(primary) <= 0 or primary.p_value > case.alpha:
        told = f"No difference from {case.opponent} can be shown: {figures}."
        return check(name, "undecided", " ".join([told, *_rows_needed(case)]))
    if primary.p_value > case.allowed:
        told = f"The gain over {case.opponent} is not sure enough after so many challenges: {figures}."
        return check(name, "undecided", " ".join([told, *_challenge(case), *_rows_needed(case)]))
    worst = primary.worst_case
    if worst is not None and not _holds(case, worst):
        return check(name, "undecided", f"{_worst_in_words(case, worst)} Otherwise: {figures}.")
    told = f"The candidate is better than {case.opponent}: {figures}."
    return check(name, "passed", " ".join([told, *_challenge(case)]))


def is_same_model(candidate: RunSummary, opponent: RunSummary) -> bool:
    """Whether both runs are answers of the same weights, loaded and asked in the same way."""
    mine, theirs = candidate.identity, opponent.identity
    return mine is not None and theirs is not None and mine.model.content() == theirs.model.content()


def _holds(case: Case, worst: WorstCase) -> bool:
    """Whether the candidate is better still, with its rows that failed or are unscored at their worst."""
    better = worst.difference is not None and sign(case.primary) * worst.difference > 0
    return better and worst.p_value is not None and worst.p_value <= case.allowed


def _worst_in_words(case: Case, worst: WorstCase) -> str:
    share = case.is_share(case.primary)
    found = f"{signed(worst.difference or 0.0, share)}, {p_in_words(worst.p_value or 1.0)}"
    return (
        f"{worst.rows - case.primary.rows:,} rows of the candidate failed or have no score where {case.opponent} has "
        f"one; if they count as its worst, it is not surely better ({found})."
    )


def _challenge(case: Case) -> Iterator[str]:
    """Which challenge this is, and what a gain found in this way is worth."""
    challenge = case.inputs.challenge
    if challenge is None:
        return
    if challenge.allowed_p_value < case.alpha:
        yield (
            f"This is challenge {challenge.number:,} of {case.opponent} on these rows: "
            f"p must be at most {challenge.allowed_p_value:.2g}."
        )
    if challenge.expected_difference is not None:
        expected = signed(challenge.expected_difference, case.is_share(case.primary))
        yield f"On fresh rows expect about {expected}."


def _rows_needed(case: Case) -> Iterator[str]:
    compared = case.primary
    effect, difference = compared.minimum_detectable_effect, abs(compared.difference or 0.0)
    if effect is None:
        return
    effect *= stats.detectable_ratio(case.allowed, case.alpha)
    rows = round_up(compared.rows * (effect / difference) ** 2) if difference > 0 else 0
    told = f"; for one as small as this about {rows:,} rows are needed." if difference > 0 else "."
    shown = amount(effect, case.is_share(compared))
    yield f"{compared.rows:,} rows show a true difference of {shown} in 4 of 5 cases{told}"


# --- guards


def _fall_p_value(case: Case, guard: MetricComparison) -> float:
    fall, margin = -gain(guard), case.margin(guard)
    if guard.difference is None:
        return 1.0
    if guard.standard_error:
        return stats.fall_p_value(fall, guard.standard_error, margin)
    return stats.constant_fall_p_value(fall, margin, guard.clusters, case.reach(guard))


def _guard(case: Case, guard: MetricComparison, fall_p_value: float) -> GateCheck:
    margin = case.margin(guard)
    name, allowed = f"{label(guard.name)} does not fall", amount(margin, case.is_share(guard))
    if guard.difference is None:
        return check(name, "undecided", f"{label(guard.name)} could not be compared on any row.")
    figures = case.figures(guard)
    # A corpus figure can fall although no row does: rows that score 0 as before, at greater length.
    if guard.losses == 0 and gain(guard) >= 0 and guard.worst_case is None:
        return check(name, "passed", f"No row is worse by {label(guard.name)}: {figures}.")
    if fall_p_value <= case.alpha:
        return check(
            name, "failed", f"{label(guard.name)} falls by more than the allowed {allowed}: {figures}."
        )
    lowest = _lowest_gain(case, guard)
    if lowest > -margin:
        told = "does not fall" if lowest >= 0 else f"falls by less than {allowed}, if at all"
        return check(name, "passed", f"{label(guard.name)} {told}: {figures}.")
    told = f"{label(guard.name)} may have fallen by more than the allowed {allowed}: {figures}."
    return check(name, "undecided", " ".join([told, *_guard_rows_needed(guard, margin)]))


def _guard_rows_needed(guard: MetricComparison, margin: float) -> Iterator[str]:
    effect = guard.minimum_detectable_effect
    if effect is not None and margin > 0:
        needed = round_up(guard.rows * (effect / margin) ** 2)
        yield f"Where it does not fall, about {needed:,} rows show so in 4 of 5 cases."


def _lowest_gain(case: Case, compared: MetricComparison) -> float:
    """Lower end of the gain's interval, also when rows without a score count as the candidate's worst."""
    interval, worst = compared.interval, compared.worst_case
    if interval is None:
        return -math.inf
    lowest = interval.low if sign(compared) > 0 else -interval.high
    if worst is None or worst.difference is None or worst.standard_error is None:
        return lowest
    reach = stats.normal_quantile(1 - case.alpha / 2) * worst.standard_error
    return min(lowest, sign(compared) * worst.difference - reach)


# --- rates


def _rate(case: Case, rate: RateComparison, is_shown: bool, is_beyond: bool) -> GateCheck:
    """`is_shown`: it rose, and not by chance. `is_beyond`: the rise is surely larger than the margin."""
    name, happened = _RATES[rate.name]
    told = f"{rate.candidate:,} of {rate.rows:,} {happened}, and {rate.baseline:,} with {case.opponent}"
    if is_shown and is_beyond:
        margin = percent(case.settings.non_inferiority_margin)
        return check(name, "failed", f"{told}: a rise of more than {margin}.")
    return check(name, "undecided" if is_shown else "passed", f"{told}.")


def _beyond_p_value(case: Case, rate: RateComparison) -> float:
    """Against "it rose by no more than the margin"; by the normal distribution of a difference of paired shares."""
    margin = case.settings.non_inferiority_margin
    if rate.rise <= 0:
        return 1.0
    changed = rate.only_candidate + rate.only_baseline
    error = sqrt(max(0.0, changed / rate.rows - rate.rise**2) / rate.rows)
    if error == 0:  # every answer of the candidate and none of the opponent's
        return stats.constant_fall_p_value(rate.rise, margin, rate.rows, 1.0)
    return stats.fall_p_value(rate.rise, error, margin)
