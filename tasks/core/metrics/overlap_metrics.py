"""Metrics that compare the words or characters of answer and reference: exact match, F1, BLEU, chrF, ROUGE.

All values are 0 to 1; sacrebleu's own figures are these times 100.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.data.normalising import UNSPACED, compared_units, squad_normalised, words
from tasks.core.metrics.metric import (
    NO_REFERENCE,
    BatchScores,
    Corpus,
    FloatArray,
    Metric,
    MetricFamily,
    compared,
    row_of_reference,
    single,
)
from tasks.core.metrics.ngrams import (
    BLEU_ORDER,
    BLEU_WIDTH,
    CHRF_ORDER,
    CHRF_WIDTH,
    Tokens,
    bleu_figure,
    bleu_statistics,
    chrf_figure,
    chrf_statistics,
    common_subsequence_length,
    count_ngrams,
    sentence_bleu,
)
from tasks.core.records import Prediction

ROUGE = {
    "rouge1": ("ROUGE-1", "words"),
    "rouge2": ("ROUGE-2", "word pairs"),
    "rougeL": ("ROUGE-L", "longest common word sequence"),
}
"""Name, label, and what is counted."""


def exact_match(answer: str, reference: str) -> float:
    """1 when both are the same words in one form (see `normalising`), else 0."""
    return float(words(answer) == words(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 over the bag of words in one form (0 to 1); of scripts without blanks, of characters."""
    return _bag_f1(compared_units(answer), compared_units(reference))


def squad_exact_match(answer: str, reference: str) -> float:
    """1 when both are the same text after SQuAD's normalisation, else 0."""
    return float(squad_normalised(answer) == squad_normalised(reference))


def squad_f1(answer: str, reference: str) -> float:
    """F1 over the bag of words after SQuAD's normalisation; two texts without words agree (SQuAD 2.0's rule)."""
    return _bag_f1(squad_normalised(answer).split(), squad_normalised(reference).split())


def _bag_f1(answer_words: list[str], reference_words: list[str]) -> float:
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    common = sum((Counter(answer_words) & Counter(reference_words)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer_words), common / len(reference_words)
    return 2 * precision * recall / (precision + recall)


class _Pairs:
    """Answers beside each of their references, and the way back from pairs to rows."""

    def __init__(self, rows: Sequence[Prediction], tokenize: Callable[[str], Tokens]) -> None:
        self.reasons = [NO_REFERENCE if row.ground_truth is None else None for row in rows]
        self.row_of_pair = row_of_reference(rows)
        self.texts: list[tuple[Tokens, Tokens]] = []
        for row in rows:
            answer = tokenize(row.predicted_answer) if row.references else ""
            self.texts += [(answer, tokenize(reference)) for reference in row.references]

    def best(self, values: FloatArray) -> NDArray[np.int64]:
        """Of each row that has a reference, the pair of the highest value; the first one of equals."""
        order = np.lexsort((np.arange(len(values)), -values, self.row_of_pair))
        _, first = np.unique(self.row_of_pair[order], return_index=True)
        chosen: NDArray[np.int64] = order[first]
        return chosen

    def spread(self, values: FloatArray, chosen: NDArray[np.int64], missing: float) -> FloatArray:
        """Values of the chosen pairs at the places of their rows."""
        spread = np.full((len(self.reasons), *values.shape[1:]), missing)
        spread[self.row_of_pair[chosen]] = values[chosen]
        return spread


@cache
def _bleu_tokenizer() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU().tokenizer


def _bleu_words(text: str) -> list[str]:
    words: list[str] = _bleu_tokenizer()(text.rstrip()).split()
    return words


def _characters(text: str) -> str:
    return "".join(text.split())


def _score_bleu(rows: Sequence[Prediction]) -> BatchScores:
    pairs = _Pairs(rows, _bleu_words)
    statistics = bleu_statistics(count_ngrams(pairs.texts, BLEU_ORDER))
    return _best_of_pairs("bleu_score", pairs, sentence_bleu(statistics), statistics)


def _best_of_pairs(metric: str, pairs: _Pairs, values: FloatArray, statistics: FloatArray) -> BatchScores:
    """Of several references the one that the row's own value is best with; its counts enter the whole set's figure."""
    chosen = pairs.best(values)
    return BatchScores(
        {metric: pairs.spread(values, chosen, np.nan)},
        pairs.reasons,
        {metric: pairs.spread(statistics, chosen, 0)},
    )


def _score_chrf(rows: Sequence[Prediction]) -> BatchScores:
    pairs = _Pairs(rows, _characters)
    statistics = chrf_statistics(count_ngrams(pairs.texts, CHRF_ORDER))
    return _best_of_pairs("chrf", pairs, chrf_figure(statistics), statistics)


# What rouge-score's tokenizer keeps, and letters of other scripts, which it drops: by words, or by characters where a
# script has no blanks.
_ROUGE_WORD = re.compile(rf"[a-z0-9]+|{UNSPACED.pattern}|[^\W\d_a-z\u00aa-\u024f]+")


def _rouge_words(text: str) -> list[str]:
    found: list[str] = []
    for word in _ROUGE_WORD.findall(text.lower()):
        found += [word] if word.isascii() else UNSPACED.sub(r" \g<0> ", word).split()
    return found


def _score_rouge(rows: Sequence[Prediction]) -> BatchScores:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, equal to rouge_score.RougeScorer's for text in Latin letters.

    Its tokenizer keeps a-z and 0-9 only; words and characters of other scripts count here. Counting is ours: the
    library's table for the longest common subsequence takes quadratic memory.
    """
    pairs = _Pairs(rows, _rouge_words)
    counts = count_ngrams(pairs.texts, 2)
    lengths = counts[:, 0].copy()
    lengths[:, 2] = [common_subsequence_length(reference, answer) for answer, reference in pairs.texts]
    by_metric = (counts[:, 0], counts[:, 1], lengths)
    measured = {name: _f_measure(found) for name, found in zip(ROUGE, by_metric, strict=True)}
    return BatchScores(
        {name: pairs.spread(values, pairs.best(values), np.nan) for name, values in measured.items()},
        pairs.reasons,
    )


def _f_measure(counts: FloatArray) -> FloatArray:
    """Harmonic mean of precision and recall for counts (rows, 3): answer, reference, common."""
    answer, reference, common = counts.T
    total = answer + reference
    f_measure: FloatArray = np.divide(2 * common, total, out=np.zeros_like(total), where=total > 0)
    return f_measure


OVERLAP_FAMILIES = (
    compared(
        Metric(
            "exact_match",
            "Answer and reference are the same words: Unicode form, case, blanks, quotes, dashes, punctuation "
            "around words, articles and spellings of a number do not count; signs, points and symbols do.",
            "tasks/core/data/normalising.py",
            kind="binary",
        ),
        exact_match,
    ),
    compared(
        Metric(
            "f1",
            "Overlap of the words of answer and reference (F1), in the form of exact match; of scripts without "
            "blanks, such as Chinese or Thai, overlap of the characters.",
            "tasks/core/data/normalising.py",
        ),
        token_f1,
    ),
    compared(
        Metric(
            "squad_exact_match",
            "Answer equals the reference by SQuAD's rule, which drops all punctuation (3.14 is 314) and articles.",
            "SQuAD evaluation script v1.1",
            kind="binary",
        ),
        squad_exact_match,
    ),
    compared(
        Metric(
            "squad_f1",
            "Overlap of the words of answer and reference (F1) by SQuAD's rule.",
            "SQuAD evaluation script v2.0",
        ),
        squad_f1,
    ),
    single(
        Metric(
            "bleu_score",
            "Word n-grams of the answer that the reference has, up to four words, with brevity penalty.",
            "sacrebleu, tokenizer 13a; rows: sentence BLEU with effective order",
            label="BLEU",
            why_zero="no four words in a row match anywhere, as with very short answers",
            corpus=Corpus("corpus BLEU", BLEU_WIDTH, bleu_figure),
        ),
        _score_bleu,
    ),
    single(
        Metric(
            "chrf",
            "Character n-grams shared by answer and reference, up to six characters; recall counts more.",
            "sacrebleu, chrF2",
            label="chrF",
            corpus=Corpus("corpus chrF", CHRF_WIDTH, chrf_figure),
        ),
        _score_chrf,
    ),
    MetricFamily(
        "rouge_score",
        tuple(
            Metric(
                name,
                f"Shared {unit} of answer and reference (F1); characters of scripts without blanks count as words.",
                "rouge-score, no stemming; other scripts than Latin too",
                label=label,
            )
            for name, (label, unit) in ROUGE.items()
        ),
        _score_rouge,
    ),
)
