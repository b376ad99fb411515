"""What an evaluation found, as written to `evaluator_output_summary.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tasks.core.metrics.judge.calibration import JudgeStanding
from tasks.core.metrics.metric import Direction, ErrorPolicy, Kind
from tasks.core.metrics.usage import EmbeddingUsage, JudgeUsage
from tasks.core.records import LossPoint, Record, RunIdentity

_ASKED = ("judge: ", "embedding: ")
Winner = Literal["candidate", "baseline", "undecided"]
Decision = Literal["promote", "reject", "inconclusive"]
Opponent = Literal["base", "champion", "run"]


class ScoreInterval(Record):
    """Interval of a figure at the evaluation's confidence."""

    low: float
    high: float
    method: str


class MetricSummary(Record):
    """One metric over all rows of one run."""

    name: str
    description: str
    source: str
    kind: Kind
    direction: Direction
    minimum: float
    maximum: float | None
    aggregate: str
    value: float | None
    interval: ScoreInterval | None
    mean_of_rows: float | None
    scored_rows: int
    unscored_rows: int
    unscored_reasons: dict[str, int]
    errors_counted_as_wrong: int


class RunSummary(Record):
    """One run: where its answers came from, and its metrics."""

    run_name: str
    predictions_path: str
    predictions_sha256: str
    rows: int
    distinct_questions: int
    error_rows: int
    truncated_rows: int
    cut_in_thoughts_rows: int = Field(0, description="rows whose thoughts never ended, so without an answer")
    cut_prompt_rows: int = Field(0, description="rows whose prompt was cut on the left to fit")
    run_key: str | None = None
    identity: RunIdentity | None = None
    dataset_id: str | None = None
    dataset_split: str | None = None
    dataset_revision: str | None = None
    engine: str | None = None
    device: str | None = None
    generation_seconds: float | None = None
    completion_tokens: int | None = Field(None, description="those of thoughts included")
    reasoning_tokens: int | None = Field(None, description="completion tokens that were spent on thoughts")
    prompt_tokens: int | None = None
    completion_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    reference_perplexity: float | None = None
    reference_tokens: int | None = None
    reference_scorer: int | None = None
    library_versions: dict[str, str] = Field(default_factory=dict)
    metrics: tuple[MetricSummary, ...] = ()

    def metric(self, name: str) -> MetricSummary | None:
        """The metric of that name, if it was computed."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def leading_metric(self) -> MetricSummary:
        """The metric that is told first: the first one that has a better and a worse, if there is any."""
        return next((metric for metric in self.metrics if metric.direction != "none"), self.metrics[0])


class WorstCase(Record):
    """The same comparison with the candidate's failed and unscored rows at the metric's worst value."""

    rows: int
    difference: float | None
    standard_error: float | None
    p_value: float | None


class MetricComparison(Record):
    """Candidate minus baseline for one metric, over the rows that both scored and neither failed."""

    name: str
    direction: Direction
    rows: int
    one_sided_rows: int = Field(0, description="left out because only one of both runs is scored there")
    clusters: int
    largest_cluster_rows: int = Field(1, description="rows of the question that most rows ask")
    candidate: float | None
    baseline: float | None
    difference: float | None
    interval: ScoreInterval | None
    standard_error: float | None = None
    p_value: float | None
    p_value_method: str
    p_value_holm: float | None
    wins: int | None
    ties: int | None
    losses: int | None
    minimum_detectable_effect: float | None
    better: Winner
    worst_case: WorstCase | None = Field(
        None, description="None where no row failed or is unscored on one side"
    )


class RateComparison(Record):
    """How often answers of both runs are empty, cut or missing (`name`: empty, cut, error), over paired rows.

    `only_candidate` and `only_baseline` count the rows on which the runs differ.
    """

    name: Literal["empty", "cut", "error"]
    rows: int
    candidate: int
    baseline: int
    only_candidate: int
    only_baseline: int
    p_value: float

    @property
    def rise(self) -> float:
        """How much more often it happens to the candidate, -1 to 1."""
        return (self.candidate - self.baseline) / self.rows if self.rows else 0.0


class Comparison(Record):
    """Candidate against baseline on the same rows."""

    paired_rows: int
    only_candidate_rows: int
    only_baseline_rows: int
    different_reference_rows: int
    different_question_rows: int = Field(0, description="paired rows that do not ask the same in both runs")
    failed_rows: int = Field(0, description="paired rows left out because one run, or both, failed there")
    metrics: tuple[MetricComparison, ...]
    rates: tuple[RateComparison, ...] = ()
    candidate_characters: float | None = Field(
        None, description="mean length of its answers where neither failed"
    )
    baseline_characters: float | None = None

    @property
    def unlike_rows(self) -> int:
        """Rows that only one run has, or that are not the same in both."""
        one_sided = self.only_candidate_rows + self.only_baseline_rows
        return one_sided + max(self.different_reference_rows, self.different_question_rows)

    def metric(self, name: str) -> MetricComparison | None:
        """The metric of that name, if it was compared."""
        return next((metric for metric in self.metrics if metric.name == name), None)


class TrainingSummary(Record):
    """How the candidate's model was trained, from its manifest."""

    run_name: str
    kind: str
    base_model_id: str
    training_data_id: str
    training_row_count: int
    steps: int
    seconds: float
    trained_tokens: int
    final_loss: float | None
    final_validation_loss: float | None
    best_step: int | None = None
    best_validation_loss: float | None = None
    planned_steps: int | None = None
    stopped_early: bool = False
    losses: tuple[LossPoint, ...]


class OverlapSummary(Record):
    """Test questions that the training data holds too; `questions` are a few of them."""

    training_data_id: str
    train_rows: int
    test_rows: int
    exact_test_rows: int
    near_test_rows: int
    share: float
    questions: tuple[str, ...] = ()


class GateCheck(Record):
    """One thing the gate looked at; `detail` tells the figures in words."""

    name: str
    outcome: Literal["passed", "failed", "undecided", "skipped"]
    detail: str


class Challenge(Record):
    """Which challenge of its opponent on these rows this was, and what that asked of it."""

    number: int = Field(description="1 for the first candidate that challenged this opponent on these rows")
    challenges: int = Field(description="as many share the error (gate.challenges)")
    allowed_p_value: float = Field(description="two-sided; a promotion needs a smaller one, or this")
    expected_difference: float | None = Field(
        None, description="the primary metric's difference to expect on fresh rows, after all looks"
    )


class Verdict(Record):
    """What the gate decided, against whom, and why; `reasons` are sentences, the weightiest first.

    `notes` are sentences about what fell though nobody guards it, and about a test set that is used up.
    """

    decision: Decision
    primary_metric: str
    against: Opponent
    against_run: str
    reasons: tuple[str, ...]
    checks: tuple[GateCheck, ...]
    notes: tuple[str, ...] = ()
    missing_champion: str | None = Field(None, description="why the promoted model was not compared")
    challenge: Challenge | None = None
    noise_floor: float | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class ChampionPoint(Record):
    """One champion of the line: since when, and its score by the primary metric on the current test rows."""

    run_name: str
    promoted_at: str | None
    weights_sha256: str | None
    score: MetricSummary | None = Field(None, description="None where no evaluation has it on these rows")


class EvaluationSettings(Record):
    """Everything that the figures depend on besides the predictions, as the sections declare it.

    `others` are those settings that have no name of their own here, where they are not at their default.
    """

    metrics: tuple[str, ...]
    error_rows: ErrorPolicy
    bootstrap_resamples: int
    confidence: float
    seed: int
    llm: str | None = None
    embedding: str | None = None
    thought_markers: tuple[str, ...] | None = Field(
        None,
        description="by which thoughts were taken from answers that still held them; None: well-known ones",
    )
    others: dict[str, Any] = Field(default_factory=dict)


class EvaluationSummary(Record):
    """`evaluator_output_summary.json`; `answer` says in one sentence what was found.

    `baseline` is the run compared with (usually the base model); `champion` the run of the promoted model, if any.
    """

    format: Literal[1] = 1
    answer: str
    notes: tuple[str, ...]
    candidate: RunSummary
    baseline: RunSummary | None
    comparison: Comparison | None
    champion: RunSummary | None = None
    champion_comparison: Comparison | None = None
    verdict: Verdict | None = None
    champions: tuple[ChampionPoint, ...] = Field((), description="the line of champions, oldest first")
    overlap: OverlapSummary | None = None
    judge: JudgeUsage | None = None
    judges: tuple[JudgeStanding, ...] = Field((), description="which judged metrics may decide, and why")
    embedding: EmbeddingUsage | None = None
    training: TrainingSummary | None
    settings: EvaluationSettings
    scores_sha256: str | None = Field(None, description="digest of `scores.jsonl`; none in older summaries")
    evaluated_at: str
    tuneproof_version: str
    library_versions: dict[str, str]

    @property
    def opponents(self) -> tuple[tuple[str, str, RunSummary, Comparison | None], ...]:
        """The runs that the candidate was compared with: their part, what its column is called, the comparison."""
        parts = (
            ("baseline", "before", self.baseline, self.comparison),
            ("champion", "champion", self.champion, self.champion_comparison),
        )
        return tuple((part, name, run, found) for part, name, run, found in parts if run is not None)

    @property
    def without_verdicts(self) -> dict[str, str]:
        """Metrics that a judge or an embedding endpoint was asked for without any result: name -> a reason."""
        found = {}
        for metric in self.candidate.metrics:
            asked = [reason for reason in metric.unscored_reasons if reason.startswith(_ASKED)]
            if asked and metric.scored_rows <= metric.errors_counted_as_wrong:
                found[metric.name] = asked[0]
        return found

    @property
    def leading_metric(self) -> MetricSummary:
        """The metric that is told first: the verdict's, else the first one that has a better and a worse."""
        decisive = self.candidate.metric(self.verdict.primary_metric) if self.verdict else None
        return decisive or self.candidate.leading_metric
