"""One row as people look at it: question, reference, both answers, both scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.answers import read_answers
from tasks.core.evaluation.outputs import RowScores, read_scores
from tasks.core.evaluation.pairs import Partners
from tasks.core.records import Prediction, Record


class Answer(Record):
    """What one run answered to one question."""

    text: str
    error: str | None
    cut: bool
    tokens: int | None
    reasoning: str | None = None
    reasoning_tokens: int = 0
    cut_in_thoughts: bool = False

    @classmethod
    def of(cls, prediction: Prediction) -> Answer:
        """The parts of a prediction that differ between runs."""
        return cls(
            text=prediction.predicted_answer,
            error=prediction.error,
            cut=prediction.metadata.finish_reason == "length",
            tokens=prediction.metadata.token_count,
            reasoning=prediction.reasoning,
            reasoning_tokens=prediction.metadata.reasoning_tokens,
            cut_in_thoughts=prediction.metadata.is_cut_in_thoughts,
        )


class RowView(Record):
    """A row of the report and of the spreadsheet."""

    id: str
    question: str
    system_prompt: str | None
    reference: str | None
    candidate: Answer
    baseline: Answer | None
    scores: RowScores


def _shown(references: tuple[str, ...]) -> str | None:
    """The reference, and what would be right too."""
    if len(references) < 2:
        return next(iter(references), None)
    return f"{references[0]}\n(also right: {'; '.join(references[1:])})"


def row_views(
    predictions_path: Path,
    baseline_path: Path | None,
    scores_path: Path,
    markers: Sequence[str] | None = None,
) -> Iterator[RowView]:
    """Join predictions and scores in the candidate's order, with constant memory where the baseline's is the same.

    `markers` as in the settings: by which thoughts are taken from answers that still hold them.

    Raises EvaluationError when the scores are not those of the predictions.
    """
    partners = Partners([] if baseline_path is None else read_answers(baseline_path, markers))
    predictions, scores = read_answers(predictions_path, markers), read_scores(scores_path)
    while True:
        prediction, row = next(predictions, None), next(scores, None)
        if prediction is None and row is None:
            return
        if prediction is None or row is None or prediction.id != row.id:
            raise EvaluationError(
                f"{scores_path} holds the scores of other predictions than {predictions_path}",
                "run `tuneproof evaluate` again; it calls no model",
            )
        partner = None if row.baseline_scores is None else partners.of(prediction.id)
        yield RowView(
            id=prediction.id,
            question=prediction.question,
            system_prompt=prediction.system_prompt,
            reference=_shown(prediction.references),
            candidate=Answer.of(prediction),
            baseline=None if partner is None else Answer.of(partner),
            scores=row,
        )
