"""Single rows, as tests look at them."""

from __future__ import annotations

from tasks.core.prompts.tokens import PromptBuilder, TrainingRow
from tasks.core.records import Example


def first_row(builder: PromptBuilder, example: Example) -> TrainingRow:
    """What is learnt of one example; of a conversation the row with the last answer."""
    return next(builder.training_rows((example,)))
