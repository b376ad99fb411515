"""How long scoring takes, against calling the metric libraries row by row, and its peak memory.

    python bench/scoring.py [ROWS]

The rows are made here: references of 20 to 80 words, answers that share most words with them.
The libraries score a sample of them; their time is scaled to all rows.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.core.evaluation.comparison import compare_tables
from tasks.core.evaluation.scoring import ScoreTable, score_predictions
from tasks.core.evaluation.summary import EvaluationSettings
from tasks.core.metrics.catalogue import resolve
from tasks.core.records import Prediction

STARTS, VOWELS, ENDS = ("str", "b", "ch", "m"), ("a", "e", "o", "ai"), ("n", "rk", "st", "p", "ll")
WORDS = [start + vowel + end for start in STARTS for vowel in VOWELS for end in ENDS]
SAMPLE = 500


def predictions(count: int, seed: int) -> Iterator[Prediction]:
    """Rows whose answers keep about two thirds of the reference's words."""
    references, answers = random.Random(0), random.Random(seed)
    for i in range(count):
        words = references.choices(WORDS, k=references.randint(20, 80))
        answer = [word if answers.random() < 0.67 else answers.choice(WORDS) for word in words]
        yield Prediction(
            id=str(i),
            question=str(i),
            predicted_answer=" ".join(answer),
            ground_truth=f"{' '.join(words)} {i}",
        )


def library_calls() -> dict[str, Callable[[str, str], object]]:
    """How one row is scored with each library's own function."""
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    return {
        "bleu_score": lambda answer, reference: sacrebleu.sentence_bleu(answer, [reference]),
        "chrf": lambda answer, reference: sacrebleu.sentence_chrf(answer, [reference]),
        "rouge_score": lambda answer, reference: rouge.score(reference, answer),
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Print one line a metric, then the time of the comparison and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=int, nargs="?", default=100_000)
    count: int = parser.parse_args().rows
    sample = list(predictions(min(SAMPLE, count), 1))
    calls = library_calls()
    print(f"{count:,} rows\n{'metric':<16}{'seconds':>9}{'library':>9}{'ratio':>7}")
    total = library_total = 0.0
    for family in resolve(
        ["exact_match", "f1", "bleu_score", "chrf", "rouge_score", "numeric_match", "contains"]
    ):
        score_predictions(sample[:2], [family])  # imports are not counted
        seconds = timed(lambda family=family: score_predictions(predictions(count, 1), [family]))  # type: ignore[misc]
        seconds -= timed(lambda: sum(1 for _ in predictions(count, 1)))
        line = f"{family.name:<16}{seconds:>9.1f}"
        if call := calls.get(family.name):
            pairs = [(row.predicted_answer, row.ground_truth or "") for row in sample]
            library = timed(lambda call=call, pairs=pairs: [call(*pair) for pair in pairs])  # type: ignore[misc]
            library *= count / len(pairs)
            line += f"{library:>9.1f}{library / seconds:>7.1f}"
            total, library_total = total + seconds, library_total + library
        print(line)
    print(f"{'three libraries':<16}{total:>9.1f}{library_total:>9.1f}{library_total / total:>7.1f}")
    tables: list[ScoreTable] = []
    families = resolve(["exact_match", "f1", "bleu_score", "chrf", "rouge_score"])
    for seed in (1, 2):
        tables.append(score_predictions(predictions(count, seed), families))
    settings = EvaluationSettings(
        metrics=(), error_rows="wrong", bootstrap_resamples=10_000, confidence=0.95, seed=42
    )
    compared = timed(lambda: compare_tables(tables[0], tables[1], settings))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"comparison of two runs, 10,000 resamples: {compared:.1f} s; peak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
