"""What judges and embedding models took: calls, texts, tokens, time and money, as an evaluation tells of it."""

from __future__ import annotations

from pydantic import Field

from tasks.core.records import Record


class JudgeUsage(Record):
    """What the judge model did in one evaluation, over all runs that were scored, and what it cost."""

    model: str
    endpoint: str | None = Field(None, description="address; None for a judge on this machine")
    calls: int = Field(0, description="replies that were generated now")
    cached: int = Field(0, description="verdicts that were there from earlier calls")
    failures: dict[str, int] = Field(default_factory=dict, description="reason -> verdicts that are missing")
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    calls_without_token_counts: int = Field(0, description="their tokens are estimated from the texts")
    cost_dollars: float | None = None
    budget_dollars: float | None = None


class EmbeddingUsage(Record):
    """Which embedding model compared texts, and what it did."""

    model: str
    endpoint: str | None = None
    texts: int = Field(0, description="texts embedded now")
    cached: int = Field(0, description="texts whose vector was there")
    input_tokens: int = Field(0, description="as the endpoint counts them")
