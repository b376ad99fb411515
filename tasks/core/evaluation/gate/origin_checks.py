"""Checks of what is known besides the scores: who judged, whose answers these are, what was trained on."""

from __future__ import annotations

from tasks.core.evaluation.gate.case import Case, Found, finding
from tasks.core.evaluation.wording import percent
from tasks.core.metrics.likelihood_metrics import PERPLEXITY

_MOST_QUOTED = 2
_SETTINGS_OF_MODELS = frozenset(("quantization", "dtype"))
"""What belongs to a model's identity and is a setting all the same: how its weights are held."""
_COMPARED = frozenset(("thoughts", "rows"))
"""Markers of thoughts are the model's own, as its template is; rows have a check of their own."""


def judge_agrees(case: Case) -> Found:
    """Whether the judge of each deciding metric was compared with people, where one is judged."""
    judges = [judge for judge in case.inputs.judges if judge.metric in case.deciding]
    if not judges:
        return
    open_ones = [judge for judge in judges if not judge.may_decide]
    told = " ".join(judge.told for judge in open_ones or judges)
    yield finding("The judge agrees with people", "undecided" if open_ones else "passed", told)


def champion_compared(case: Case) -> Found:
    """Whether a champion that exists was compared."""
    if case.inputs.missing_champion is not None:
        yield finding("Compared with the champion", "undecided", f"{case.inputs.missing_champion}.")


def same_settings(case: Case) -> Found:
    """Whether both models answered with the same settings."""
    mine, theirs, name = case.inputs.candidate.identity, case.inputs.opponent.identity, "Same settings"
    if mine is None or theirs is None:
        yield finding(name, "skipped", "A plain file of answers says nothing about its settings.")
        return
    of_the_models = {*mine.model.content(), *theirs.model.content()} - _SETTINGS_OF_MODELS
    others = [other for other in theirs.differences(mine) if other.name not in {*of_the_models, *_COMPARED}]
    if others:
        listed = "; ".join(map(str, others))
        yield finding(name, "failed", f"Both runs must have the same settings; other: {listed}.")
    else:
        yield finding(name, "passed", "Both models answered with the same settings.")


def same_reference_scores(case: Case) -> Found:
    """Whether the references of both models were scored in the same way; nothing where it makes no difference."""
    mine, theirs = case.inputs.candidate, case.inputs.opponent
    scored = [run for run in (mine, theirs) if run.reference_perplexity is not None]
    in_16_bits = [run for run in scored if run.identity is None or not run.identity.model.is_float32]
    if len(scored) < 2 or mine.reference_scorer == theirs.reference_scorer or not in_16_bits:
        return
    older = min(scored, key=lambda run: run.reference_scorer or 1)
    decides = PERPLEXITY.name in case.deciding
    yield finding(
        "References scored alike",
        "undecided" if decides else "skipped",
        f"The references of {older.run_name} were scored by a version that rounds otherwise in 16 bits; perplexities "
        f"differ by that too{'' if decides else ', and decide nothing here'}. Run its `tuneproof infer` again: only "
        "the references are scored again.",
    )


def same_template(case: Case) -> Found:
    """Whether the candidate answered with the chat template that it was trained with."""
    name, is_same = "Same chat template", case.inputs.same_template
    if is_same is None:
        yield finding(name, "skipped", "The candidate's training is not known.")
    elif is_same:
        yield finding(name, "passed", "Training and answers used the same chat template.")
    else:
        told = "The candidate was trained with another chat template than it answers with."
        yield finding(name, "failed", told)


def new_questions(case: Case) -> Found:
    """Whether the test questions are not in the training data."""
    overlap, name = case.inputs.overlap, "Test questions are new"
    if isinstance(overlap, str):
        yield finding(name, "skipped", f"Training data was not compared: {overlap}.")
        return
    same = overlap.exact_test_rows + overlap.near_test_rows
    allowed = f"{percent(case.settings.maximum_overlap)} are allowed"
    told = (
        f"{same:,} of {overlap.test_rows:,} test questions are in the training data "
        f"({overlap.exact_test_rows:,} exactly, {overlap.near_test_rows:,} nearly; {allowed})"
    )
    if overlap.share <= case.settings.maximum_overlap:
        yield finding(name, "passed", f"{told}.")
        return
    quoted = "; ".join(f"“{_shortened(question)}”" for question in overlap.questions[:_MOST_QUOTED])
    yield finding(name, "failed", f"{told}: {quoted}")


def _shortened(question: str, length: int = 80) -> str:
    flat = " ".join(question.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"
