"""Figures in words: the one-sentence answer, the notes, the list of settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tasks.core.evaluation.statistics import shows_difference
from tasks.core.evaluation.summary import (
    Comparison,
    EvaluationSummary,
    GateCheck,
    MetricComparison,
    MetricSummary,
    RunSummary,
    ScoreInterval,
)
from tasks.core.metrics.catalogue import known_metric
from tasks.core.metrics.usage import EmbeddingUsage, JudgeUsage

_OUTCOMES = ("passed", "failed", "undecided", "skipped")
MINUS = "\N{MINUS SIGN}"


def label(name: str) -> str:
    """A metric's name as people write it."""
    known = known_metric(name)
    if known is not None and known.label is not None:
        return known.label
    return name if ":" in name else name.replace("_", " ").capitalize()


def is_share(minimum: float, maximum: float | None) -> bool:
    """Whether values lie between 0 and 1, and are shown times 100."""
    return minimum == 0 and maximum == 1


def shown(value: float, share: bool) -> str:
    """A figure with one decimal (shares times 100) or three significant digits."""
    text = f"{100 * value:.1f}" if share else _plain(value)
    return text.replace("-", MINUS)


def shown_difference(value: float, share: bool) -> str:
    """The same with its sign; a difference that rounds to nothing has none."""
    text = f"{100 * value:+.1f}" if share else _plain(value, "+")
    return text.lstrip("+-") if not any(digit in text for digit in "123456789") else text.replace("-", MINUS)


def _plain(value: float, sign: str = "") -> str:
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"


def shown_metric(metric: MetricSummary | None) -> str:
    """A metric of one run with its interval: "75.0 [66.0, 83.0]"."""
    if metric is None or metric.value is None:
        return "not scored"
    share, interval = is_share(metric.minimum, metric.maximum), metric.interval
    told = shown(metric.value, share)
    return told + (f" [{shown(interval.low, share)}, {shown(interval.high, share)}]" if interval else "")


def shown_change(change: MetricComparison, metric: MetricSummary) -> str:
    """What changed in `metric`, with its interval: "+75.0 [+66.0, +83.0]"; nothing where nothing was compared."""
    if change.difference is None:
        return ""
    share, interval = is_share(metric.minimum, metric.maximum), change.interval
    told = shown_difference(change.difference, share)
    if interval is None:
        return told
    return f"{told} [{shown_difference(interval.low, share)}, {shown_difference(interval.high, share)}]"


def percent(share: float) -> str:
    """0.95 becomes "95 %"."""
    return f"{100 * share:g} %"


def count_checks(checks: Iterable[GateCheck]) -> str:
    """How many checks of the gate ended in which way: "6 checks: 4 passed, 1 failed, 1 skipped"."""
    counts = Counter[str](check.outcome for check in checks)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
    total = counts.total()
    return f"{total} check{'' if total == 1 else 's'}: {told or 'none'}"


def headline(
    candidate: RunSummary,
    baseline: RunSummary | None,
    comparison: Comparison | None,
    confidence: float,
    primary: str | None = None,
) -> str:
    """What was found about the metric named, else about the first with a direction, in one or two sentences."""
    metric = (candidate.metric(primary) if primary else None) or candidate.leading_metric
    if metric.value is None:
        reasons = ", ".join(f"{reason}: {count} rows" for reason, count in metric.unscored_reasons.items())
        return f"No row could be scored by {_in_sentence(metric)} ({reasons})."
    compared = comparison.metric(metric.name) if comparison else None
    if baseline is None or compared is None or compared.difference is None:
        return _alone(metric, confidence)
    return _against_baseline(metric, compared, confidence)


def _is_shown(compared: MetricComparison, confidence: float) -> bool:
    interval, p_value = compared.interval, compared.p_value
    if interval is None or p_value is None:
        return False
    return shows_difference((interval.low, interval.high), p_value, confidence)


def _in_sentence(metric: MetricSummary) -> str:
    name = label(metric.name)
    return name.lower() if name.lower().replace(" ", "_") == metric.name else name


def _range(interval: ScoreInterval | None, share: bool, confidence: float, *, signed: bool) -> str:
    if interval is None:
        return ""
    show = shown_difference if signed else shown
    return f" ({percent(confidence)} interval {show(interval.low, share)} to {show(interval.high, share)})"


def _alone(metric: MetricSummary, confidence: float) -> str:
    share = is_share(metric.minimum, metric.maximum)
    value = shown(metric.value or 0.0, share)
    found = _range(metric.interval, share, confidence, signed=False)
    return f"{label(metric.name)} is {value}. On {metric.scored_rows:,} rows{found}; nothing is compared."


def _against_baseline(metric: MetricSummary, compared: MetricComparison, confidence: float) -> str:
    share = is_share(metric.minimum, metric.maximum)
    unit = " points" if share else ""
    figures = (
        f"{label(metric.name)} {shown(compared.candidate or 0.0, share)} against "
        f"{shown(compared.baseline or 0.0, share)}, a difference of "
        f"{shown_difference(compared.difference or 0.0, share)}{unit}"
        f"{_range(compared.interval, share, confidence, signed=True)} on {compared.rows:,} rows."
    )
    if compared.direction == "none" and _is_shown(compared, confidence):
        word = "higher" if (compared.difference or 0.0) > 0 else "lower"
        return f"{label(metric.name)}: the candidate's figure is {word} than its baseline's. {figures}"
    if compared.better == "candidate":
        return f"The candidate is better than its baseline. {figures}"
    if compared.better == "baseline":
        return f"The candidate is worse than its baseline. {figures}"
    return f"No difference from the baseline can be shown. {figures}"


def notes(
    candidate: RunSummary,
    baseline: RunSummary | None,
    comparison: Comparison | None,
    no_baseline_reason: str | None = None,
    primary: str | None = None,
) -> tuple[str, ...]:
    """What a reader must know to judge the figures, most important first."""
    missing = () if no_baseline_reason is None else (f"Nothing is compared: {no_baseline_reason}.",)
    return (
        *missing,
        *_thought_notes(candidate, "candidate"),
        *(_thought_notes(baseline, "baseline") if baseline else ()),
        *_comparison_notes(comparison, primary or candidate.leading_metric.name),
        *_setting_notes(candidate, baseline),
        *_run_notes(candidate, "candidate"),
        *(_run_notes(baseline, "baseline") if baseline else ()),
    )


def _comparison_notes(comparison: Comparison | None, leading: str) -> Iterator[str]:
    if comparison is None:
        return
    first = comparison.metric(leading)
    for winner, word in (("candidate", "better"), ("baseline", "worse")):
        names = [
            label(metric.name)
            for metric in comparison.metrics
            if metric.better == winner and metric.name != leading
        ]
        if names and (first is None or first.better != winner):
            yield f"By {', '.join(names)} the candidate is {word}."
    unpaired = comparison.only_candidate_rows + comparison.only_baseline_rows
    if unpaired:
        yield (
            f"{comparison.paired_rows:,} rows are compared; {comparison.only_candidate_rows:,} rows are only in "
            f"the candidate's run and {comparison.only_baseline_rows:,} only in the baseline's."
        )
    if comparison.different_reference_rows:
        yield f"{comparison.different_reference_rows:,} compared rows have different references in the two runs."


def _setting_notes(candidate: RunSummary, baseline: RunSummary | None) -> Iterator[str]:
    if baseline is None or candidate.identity is None or baseline.identity is None:
        return
    others = [
        other
        for other in baseline.identity.differences(candidate.identity)
        if other.name not in ("weights", "adapter", "rows")
    ]
    if others:
        listed = "; ".join(map(str, others))
        yield f"The two runs differ in more than the weights (baseline -> candidate): {listed}."


def _thought_notes(run: RunSummary, who: str) -> Iterator[str]:
    if run.cut_in_thoughts_rows:
        yield (
            f"{run.cut_in_thoughts_rows:,} of {run.rows:,} answers of the {who} "
            f"({shown(run.cut_in_thoughts_rows / run.rows, True)} %) were cut in their thoughts and count as empty; "
            "a larger max_new_tokens lets it finish."
        )


def _run_notes(run: RunSummary, who: str) -> Iterator[str]:
    if run.error_rows:
        wrong = max((metric.errors_counted_as_wrong for metric in run.metrics), default=0)
        treatment = "they count as wrong" if wrong else "they are left out of the scores"
        yield f"{run.error_rows:,} of {run.rows:,} rows of the {who} have no answer because of an error; {treatment}."
    for metric in run.metrics:
        known = known_metric(metric.name)
        if known is not None and known.why_zero and metric.value == 0 and metric.mean_of_rows:
            mean = shown(metric.mean_of_rows, is_share(metric.minimum, metric.maximum))
            yield (
                f"{label(metric.name)} of the {who} is 0 because {known.why_zero}; the mean of its rows is {mean}."
            )
    if run.truncated_rows:
        yield f"{run.truncated_rows:,} of {run.rows:,} answers of the {who} were cut at the token limit."
    if run.cut_prompt_rows:
        yield f"{run.cut_prompt_rows:,} of {run.rows:,} prompts of the {who} were cut on the left to fit."
    unscored: dict[tuple[tuple[str, int], ...], list[MetricSummary]] = {}
    for metric in run.metrics:
        unscored.setdefault(tuple(metric.unscored_reasons.items()), []).append(metric)
    for reasons, metrics in unscored.items():
        if reasons:
            names = (
                "any metric" if metrics == list(run.metrics) else ", ".join(label(m.name) for m in metrics)
            )
            why = ", ".join(f"{reason}: {count:,}" for reason, count in reasons)
            yield f"{metrics[0].unscored_rows:,} rows of the {who} are not scored by {names} ({why})."
    if run.distinct_questions < run.rows:
        yield (
            f"The {who}'s {run.rows:,} rows hold {run.distinct_questions:,} different questions; rows with the "
            "same question are drawn together for the intervals."
        )


def setting_rows(summary: EvaluationSummary) -> Iterator[tuple[str, str | float | int | None]]:
    """Name and value of every setting and origin, for the settings sheet and the report."""
    settings = summary.settings
    yield "answer", summary.answer
    for number, note in enumerate(summary.notes, start=1):
        yield f"note {number}", note
    yield "evaluated at", summary.evaluated_at
    yield "tuneproof", summary.tuneproof_version
    yield "metrics", ", ".join(settings.metrics)
    yield "error rows", settings.error_rows
    yield "bootstrap resamples", settings.bootstrap_resamples
    yield "confidence", settings.confidence
    yield "seed", settings.seed
    yield "judge model", settings.llm
    yield "embedding model", settings.embedding
    yield from _flat(settings.others)
    for what, usage in (("judge", summary.judge), ("embedding", summary.embedding)):
        if usage is not None:
            for key, value in _flat(usage.model_dump(mode="json")):
                yield f"{what} {key}", value
    for name, library_version in summary.library_versions.items():
        yield f"evaluation library {name}", library_version
    for who, run in (("candidate", summary.candidate), ("baseline", summary.baseline)):
        if run is not None:
            yield from _run_rows(who, run)


def _run_rows(who: str, run: RunSummary) -> Iterator[tuple[str, str | float | int | None]]:
    for name, value in run.model_dump(mode="json", exclude={"metrics"}).items():
        nested = value if isinstance(value, dict) else {"": value}
        for key, inner in _flat(nested):
            yield f"{who} {name} {key}".rstrip(), inner


def _flat(nested: dict[str, object], prefix: str = "") -> Iterator[tuple[str, str | float | int | None]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is None or isinstance(value, (str, int, float)):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", str(value)


def no_verdicts(summary: EvaluationSummary) -> str:
    """Which metrics were asked for in vain, and why."""
    told = "; ".join(f"{name} ({reason})" for name, reason in summary.without_verdicts.items())
    return f"There is no verdict on any of {summary.candidate.rows:,} rows for {told}."


def model_notes(judge: JudgeUsage | None, embedding: EmbeddingUsage | None) -> Iterator[str]:
    """What the judge and the embedding model did, and what it cost."""
    if judge is not None:
        tokens = f"{judge.input_tokens:,} tokens in, {judge.output_tokens:,} out"
        cost = "" if judge.cost_dollars is None else f", {judge.cost_dollars:,.4f} dollars"
        estimated = (
            f"; {judge.calls_without_token_counts:,} replies came without token counts, which are estimated"
            if judge.calls_without_token_counts
            else ""
        )
        yield (
            f"The judge {judge.model} replied {judge.calls:,} times ({tokens}{cost}{estimated}); "
            f"{judge.cached:,} replies were there from earlier."
        )
        for reason, count in judge.failures.items():
            yield f"{count:,} verdicts are missing: {reason}."
    if embedding is not None:
        yield f"The embedding model {embedding.model} compared {embedding.texts + embedding.cached:,} texts."
