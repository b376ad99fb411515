"""What the gate looks at besides the scores: where the answers come from, and what the model was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from tasks.core.evaluation.summary import GateCheck
from tasks.core.evaluation.wording import percent

if TYPE_CHECKING:
    from tasks.core.config import GateConfig
    from tasks.core.evaluation.gate.inputs import GateInputs

Outcome = Literal["passed", "failed", "undecided", "skipped"]
_MOST_QUOTED = 2
_SETTINGS_OF_MODELS = frozenset(("quantization", "dtype"))
"""What belongs to a model's identity and is a setting all the same: how its weights are held."""
_COMPARED = frozenset(("thoughts", "rows"))
"""Markers of thoughts are the model's own, as its template is; rows have a check of their own."""


def check(name: str, outcome: Outcome, detail: str) -> GateCheck:
    """One thing the gate looked at; `detail` is a sentence."""
    return GateCheck(name=name, outcome=outcome, detail=detail)


def origin_checks(inputs: GateInputs, settings: GateConfig) -> Iterator[GateCheck]:
    """Whether both runs compare: the same opponent, settings and template, and test questions that are new."""
    if inputs.missing_champion is not None:
        yield check("Compared with the champion", "undecided", f"{inputs.missing_champion}.")
    yield _settings_check(inputs)
    yield _template_check(inputs)
    yield _overlap_check(inputs, settings)


def may_decide(inputs: GateInputs, metric: str) -> bool:
    """Whether a metric may speak for or against a model: a judged one only where its judge agrees with people."""
    return all(judge.may_decide for judge in inputs.judges if judge.metric == metric)


def judged_check(inputs: GateInputs, deciding: Sequence[str]) -> GateCheck | None:
    """Whether the judge of each deciding metric was compared with people; None where none of them is judged."""
    judges = [judge for judge in inputs.judges if judge.metric in deciding]
    if not judges:
        return None
    open_ones = [judge for judge in judges if not judge.may_decide]
    told = " ".join(judge.told for judge in open_ones or judges)
    return check("The judge agrees with people", "undecided" if open_ones else "passed", told)


def _settings_check(inputs: GateInputs) -> GateCheck:
    mine, theirs, name = inputs.candidate.identity, inputs.opponent.identity, "Same settings"
    if mine is None or theirs is None:
        return check(name, "skipped", "A plain file of answers says nothing about its settings.")
    of_the_models = {*mine.model.content(), *theirs.model.content()} - _SETTINGS_OF_MODELS
    others = [other for other in theirs.differences(mine) if other.name not in {*of_the_models, *_COMPARED}]
    if others:
        listed = "; ".join(map(str, others))
        return check(name, "failed", f"Both runs must have the same settings; other: {listed}.")
    return check(name, "passed", "Both models answered with the same settings.")


def _template_check(inputs: GateInputs) -> GateCheck:
    name = "Same chat template"
    if inputs.same_template is None:
        return check(name, "skipped", "The candidate's training is not known.")
    if inputs.same_template:
        return check(name, "passed", "Training and answers used the same chat template.")
    told = "The candidate was trained with another chat template than it answers with."
    return check(name, "failed", told)


def _overlap_check(inputs: GateInputs, settings: GateConfig) -> GateCheck:
    overlap, name = inputs.overlap, "Test questions are new"
    if isinstance(overlap, str):
        return check(name, "skipped", f"Training data was not compared: {overlap}.")
    same = overlap.exact_test_rows + overlap.near_test_rows
    allowed = f"{percent(settings.maximum_overlap)} are allowed"
    told = (
        f"{same:,} of {overlap.test_rows:,} test questions are in the training data "
        f"({overlap.exact_test_rows:,} exactly, {overlap.near_test_rows:,} nearly; {allowed})"
    )
    if overlap.share <= settings.maximum_overlap:
        return check(name, "passed", f"{told}.")
    quoted = "; ".join(f"“{_shortened(question)}”" for question in overlap.questions[:_MOST_QUOTED])
    return check(name, "failed", f"{told}: {quoted}")


def _shortened(question: str, length: int = 80) -> str:
    flat = " ".join(question.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"
