"""Checks of the evidence: the same rows, enough of them, answered and scored; a gain that counts."""

from __future__ import annotations

from tasks.core.evaluation import statistics as stats
from tasks.core.evaluation.gate.case import Case, Finding, Found, amount, check, finding, gain, signed
from tasks.core.evaluation.wording import label, percent


def error_rows(case: Case) -> Found:
    """Whether few rows failed; more failures than the opponent's speak against the model."""
    allowed, name = case.settings.maximum_error_rate, "Few rows with errors"
    candidate, opponent = case.inputs.candidate, case.inputs.opponent
    mine, theirs = (run.error_rows / run.rows for run in (candidate, opponent))
    told = f"{candidate.error_rows:,} of {candidate.rows:,} rows have an error"
    others = f"{opponent.error_rows:,} of {case.opponent}'s {opponent.rows:,}"
    if max(mine, theirs) <= allowed:
        yield finding(name, "passed", f"{told}; {percent(allowed)} are allowed.")
    elif theirs >= mine:
        told += f", and {others}; {percent(allowed)} are allowed: look at the data and the machine."
        yield finding(name, "undecided", told)
    else:
        yield Finding(check(name, "failed", f"{told}; {percent(allowed)} are allowed."), rejects=True)


def same_rows(case: Case) -> Found:
    """Whether both runs answered the same questions with the same references."""
    comparison, name = case.inputs.comparison, "The same rows"
    counts = (
        (comparison.only_candidate_rows, "are only in the candidate's run"),
        (comparison.only_baseline_rows, "are only in the other run"),
        (comparison.different_question_rows, "ask something else in both runs"),
        (comparison.different_reference_rows, "have another reference in both runs"),
    )
    rows = comparison.paired_rows + comparison.only_candidate_rows + comparison.only_baseline_rows
    told, allowed = ", ".join(f"{count:,} {what}" for count, what in counts if count), _unscored_allowed(case)
    if not told:
        yield finding(name, "passed", f"Both runs answer the same {rows:,} rows.")
        return
    told = f"Of {rows:,} rows {told}; {percent(allowed)} are allowed"
    if comparison.unlike_rows <= allowed * rows:
        yield finding(name, "passed", f"{told}.")
    else:
        told += " (gate.maximum_unscored_rate): let both models answer the same rows."
        yield finding(name, "undecided", told)


def enough_rows(case: Case) -> Found:
    """Whether enough different questions are scored."""
    least, primary = case.settings.minimum_rows, case.primary
    told = (
        f"{primary.clusters:,} different questions are scored in both runs; at least {least:,} are asked for."
    )
    if primary.interval is not None and primary.interval.method == stats.JACKKNIFE_T:
        told += (
            f" One question is asked in {primary.largest_cluster_rows:,} of {primary.rows:,} rows, so the interval "
            "is wider."
        )
    yield finding("Enough rows", "passed" if primary.clusters >= least else "undecided", told)


def enough_scored(case: Case) -> Found:
    """Rows that fell out of the figures: the better or the worse ones of a run may be among them.

    A guard that neither run has for a row (its reference has no number, say) hides nothing; it is left out.
    """
    answered = case.inputs.comparison.paired_rows - case.inputs.comparison.failed_rows
    if answered <= 0:
        return
    missing = {case.primary.name: (answered - case.primary.rows, "is missing")}
    missing |= {guard.name: (guard.one_sided_rows, "is missing in one run") for guard in case.guards}
    worst = max(missing, key=lambda name: missing[name][0])
    rows, how = missing[worst]
    allowed, name = _unscored_allowed(case), "Enough rows scored"
    told = f"{label(worst)} {how} for {rows:,} of {answered:,} rows; {percent(allowed)} are allowed"
    if rows <= allowed * answered:
        yield finding(name, "passed", f"{told}.")
    else:
        yield finding(name, "undecided", f"{told} (gate.maximum_unscored_rate); the report says why.")


def worthwhile_gain(case: Case) -> Found:
    """Whether the gain is as large as somebody asks for, if anybody does."""
    least, found = case.settings.minimum_effect, gain(case.primary)
    if least == 0:
        return
    share = case.is_share(case.primary)
    told = f"The gain is {signed(found, share)}; less than {amount(least, share)} is not worth a promotion."
    yield finding("The gain is worth it", "passed" if found >= least else "undecided", told)


def above_noise(case: Case) -> Found:
    """Whether the difference is larger than what other batches alone change."""
    noise, name = case.inputs.noise, "The difference is above the noise"
    if noise.value is None:
        yield finding(name, "skipped", f"The noise was not measured: {noise.reason}.")
        return
    if noise.reason is not None:
        yield finding(name, "passed", f"There is no noise: {noise.reason}.")
        return
    share, effect = case.is_share(case.primary), abs(gain(case.primary))
    told = (
        f"Answered again in other batches, {noise.changed} of {noise.rows} rows score differently, by "
        f"{amount(noise.value, share)} on average"
    )
    if noise.value == 0 or effect > noise.value:
        yield finding(name, "passed", f"{told}.")
    else:
        yield finding(name, "undecided", f"{told}; the difference of {amount(effect, share)} is no larger.")


def _unscored_allowed(case: Case) -> float:
    return case.settings.maximum_unscored_rate
