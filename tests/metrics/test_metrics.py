"""Metrics: their values, what is unscored, how error rows count; equal to the reference implementations."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tasks.core.errors import EvaluationError
from tasks.core.evaluation.scoring import ScoreTable, score_predictions
from tasks.core.metrics.catalogue import available, reported, resolve
from tasks.core.metrics.ngrams import common_subsequence_length, count_ngrams
from tasks.core.metrics.overlap_metrics import exact_match, squad_exact_match, token_f1
from tasks.core.metrics.overlap_metrics import squad_f1 as our_squad_f1
from tasks.core.records import Prediction, PredictionMetadata

STRANGE = [
    "",
    " ",
    ".",
    "the",
    "A",
    "Paris.",
    "the capital of France is Paris",
    "Die Hauptstadt von Frankreich ist Paris, nicht Zürich.",
    "答案是北京。",
    "Ответ: Париж",
    "הבירה היא פריז",
    "العاصمة هي باريس",
    "😀 👩‍👩‍👧‍👦 done",
    "a\u2028b\x00c\td\u00a0e",
    "x" * 5000,
    "yes " * 800,
    "1, 2, 3, 4, 5",
    "Line one.\nLine two.\n\n#### 72",
]


def prediction(answer: str, reference: str | None, *, row: int = 0, error: str | None = None) -> Prediction:
    return Prediction(
        id=f"row-{row}",
        question=f"question {row}",
        predicted_answer=answer,
        ground_truth=reference,
        error=error,
        metadata=PredictionMetadata(finish_reason="error" if error else "stop"),
    )


def table_of(pairs: Sequence[tuple[str, str | None]], *names: str) -> ScoreTable:
    rows = [prediction(answer, reference, row=i) for i, (answer, reference) in enumerate(pairs)]
    return score_predictions(rows, resolve(names))


def total(table: ScoreTable, name: str) -> float:
    return float(table.metric(name).corpus.figure(table.statistics[name].sum(axis=0)))


def squad_normalize(text: str) -> str:
    """The four steps of the SQuAD v1.1 evaluation script, written down separately."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def squad_f1(answer: str, reference: str) -> float:
    answer_words, reference_words = squad_normalize(answer).split(), squad_normalize(reference).split()
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    same = sum((Counter(answer_words) & Counter(reference_words)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer_words), same / len(reference_words)
    return (2 * precision * recall) / (precision + recall)


@pytest.fixture(scope="module")
def real_pairs(shared_data_dir: Path) -> list[tuple[str, str]]:
    """500 references of GSM8K, each with the words of another answer mixed in, and all strange texts."""
    lines = (shared_data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    references = [json.loads(line)["answer"] for line in lines]
    random = np.random.default_rng(0)
    pairs = []
    for i, reference in enumerate(references):
        words = reference.split(" ")
        other = references[(i + 1) % len(references)].split(" ")
        kept = [word if random.random() > i / 700 else other[j % len(other)] for j, word in enumerate(words)]
        pairs.append((" ".join(kept), reference))
    return pairs + [(answer, reference) for answer in STRANGE for reference in STRANGE]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("  an   apple ", "apple", 1.0),
        ("apples", "apple", 0.0),
        ("theory", "ory", 0.0),
        ("", "", 1.0),
        ("", "x", 0.0),
        ("", "A", 0.0),
        ("314", "3.14", 0.0),
        ("5", "-5", 0.0),
    ],
)
def test_exact_match_ignores_case_punctuation_articles_and_spacing(
    answer: str, reference: str, expected: float
) -> None:
    assert exact_match(answer, reference) == expected


def test_f1_is_the_harmonic_mean_of_word_precision_and_recall() -> None:
    assert token_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 1.0 * (2 / 3) / (1.0 + 2 / 3))


def test_f1_of_two_answers_that_are_only_an_article_is_one() -> None:
    assert token_f1("A", "A") == 1.0
    assert token_f1("A", "B") == 0.0


def test_the_squad_metrics_equal_the_squad_script_on_real_and_strange_rows(
    real_pairs: list[tuple[str, str]],
) -> None:
    for answer, reference in [*real_pairs, ("", "A"), ("314", "3.14"), ("5", "-5")]:
        assert squad_exact_match(answer, reference) == (squad_normalize(answer) == squad_normalize(reference))
        assert our_squad_f1(answer, reference) == pytest.approx(squad_f1(answer, reference), abs=1e-12)


def test_scripts_without_blanks_are_compared_by_character_and_others_by_word() -> None:
    assert token_f1("\u7b54\u6848\u662f\u5317\u4eac", "\u5317\u4eac") == pytest.approx(4 / 7)
    pairs = [
        ("\u5317\u4eac\u5e02", "\u5317\u4eac"),
        ("\u041e\u0442\u0432\u0435\u0442: \u041f\u0430\u0440\u0438\u0436", "\u041f\u0430\u0440\u0438\u0436"),
    ]
    table = table_of(pairs, "rouge_score")
    assert table.values["rouge1"].tolist() == pytest.approx([0.8, 2 / 3])
    assert table.values["rouge2"].tolist() == pytest.approx([2 / 3, 0.0])


def _is_latin(text: str) -> bool:
    """Whether rouge-score, which knows a to z and 0 to 9, sees all letters there are."""
    return not any(character.isalpha() and ord(character) > 0x24F for character in text)


def test_bleu_equals_sacrebleu_by_row_and_in_total(real_pairs: list[tuple[str, str]]) -> None:
    table = table_of(real_pairs, "bleu_score")
    for value, (answer, reference) in zip(table.values["bleu_score"], real_pairs, strict=True):
        expected = sacrebleu.sentence_bleu(answer, [reference], use_effective_order=True).score
        assert 100 * value == pytest.approx(expected, abs=1e-9)
    answers, references = zip(*real_pairs, strict=True)
    assert 100 * total(table, "bleu_score") == pytest.approx(
        sacrebleu.corpus_bleu(list(answers), [list(references)]).score, abs=1e-9
    )


def test_chrf_equals_sacrebleu_by_row_and_in_total(real_pairs: list[tuple[str, str]]) -> None:
    table = table_of(real_pairs, "chrf")
    for value, (answer, reference) in zip(table.values["chrf"], real_pairs, strict=True):
        expected = sacrebleu.sentence_chrf(answer, [reference]).score
        assert 100 * value == pytest.approx(expected, abs=1e-9)
    answers, references = zip(*real_pairs, strict=True)
    assert 100 * total(table, "chrf") == pytest.approx(
        sacrebleu.corpus_chrf(list(answers), [list(references)]).score, abs=1e-9
    )


def test_rouge_equals_rouge_score_by_row_and_in_total(real_pairs: list[tuple[str, str]]) -> None:
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names))
    latin = [pair for pair in real_pairs if all(map(_is_latin, pair))]
    assert len(latin) > 600
    table = table_of(latin, "rouge_score")
    expected = [scorer.score(reference, answer) for answer, reference in latin]
    for name in names:
        library = [row[name].fmeasure for row in expected]
        assert table.values[name] == pytest.approx(library, abs=1e-12)
        assert total(table, name) == pytest.approx(np.mean(library), abs=1e-12)


def test_garbage_after_the_first_sentence_lowers_bleu() -> None:
    sentence = "The answer is Paris, of course."
    table = table_of(
        [(sentence, sentence), (sentence + " Also bananas, quickly sold at dawn.", sentence)], "bleu_score"
    )
    clean, padded = table.values["bleu_score"]
    assert clean == pytest.approx(1.0)
    assert padded < 0.6


WORDS = st.lists(st.sampled_from(["a", "b", "c", "the", "cat", "é", "北", "b c"]), max_size=12).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_figures_equal_the_libraries_for_any_small_corpus(pairs: list[tuple[str, str]]) -> None:
    answers, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    table = table_of(pairs, "bleu_score", "chrf", "rouge_score")
    assert 100 * total(table, "bleu_score") == pytest.approx(
        sacrebleu.corpus_bleu(answers, [references]).score, abs=1e-9
    )
    assert 100 * total(table, "chrf") == pytest.approx(
        sacrebleu.corpus_chrf(answers, [references]).score, abs=1e-9
    )
    library = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for i, (answer, reference) in enumerate(pairs):
        if not (_is_latin(answer) and _is_latin(reference)):
            continue
        for name, score in library.score(reference, answer).items():
            assert table.values[name][i] == pytest.approx(score.fmeasure)


def ngrams_in_common(first: str, second: str, order: int) -> int:
    counts = [Counter(text[i : i + order] for i in range(len(text) - order + 1)) for text in (first, second)]
    return (counts[0] & counts[1]).total()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("abcé北😀", max_size=20), st.text("abcé北😀", max_size=20)), max_size=8))
def test_packed_ngram_counts_equal_plain_counting(pairs: list[tuple[str, str]]) -> None:
    counts = count_ngrams(pairs, 6)
    assert counts.shape == (len(pairs), 6, 3)
    for row, (first, second) in enumerate(pairs):
        for order in range(1, 7):
            assert counts[row, order - 1].tolist() == [
                max(len(first) - order + 1, 0),
                max(len(second) - order + 1, 0),
                ngrams_in_common(first, second, order),
            ]


def test_rows_with_too_many_different_tokens_to_pack_are_counted_all_the_same() -> None:
    wide = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))
    pairs = [("abc", "abd"), (wide, wide[500:] + "abc"), ("xyz", "xyz")]
    counts = count_ngrams(pairs, 6)
    assert counts[0, 1].tolist() == [2, 2, 1]
    assert counts[1, 2].tolist() == [1498, 1001, 998]
    assert counts[2, 0].tolist() == [3, 3, 3]


def test_more_rows_than_fit_into_one_block_are_counted_each_for_itself() -> None:
    pairs = [(f"{i:06d}", f"{i + 1:06d}") for i in range(5000)]
    counts = count_ngrams(pairs, 3)
    for i in (0, 4095, 4096, 4999):
        assert counts[i, 1, 2] == ngrams_in_common(*pairs[i], 2)


def test_a_very_long_answer_is_counted_in_seconds() -> None:
    answer = "".join(chr(97 + i % 26) + str(i) for i in range(120_000))
    counts = count_ngrams([(answer, "short reference")], 6)
    assert counts[0, 0, 0] == len(answer)
    assert common_subsequence_length(["yes"] * 50_000, ["no", "yes", "yes"]) == 2


def test_a_row_without_a_reference_is_unscored_with_its_reason_and_not_averaged() -> None:
    text = "Paris is the capital of France"
    table = table_of([(text, text), (text, None)], *DEFAULT_NAMES)
    for metric in table.metrics:
        assert table.reasons[metric.name] == [None, "no reference"]
        assert np.isnan(table.values[metric.name][1])
        assert total(table, metric.name) == pytest.approx(table.values[metric.name][0])


DEFAULT_NAMES = ("exact_match", "f1", "bleu_score", "chrf", "rouge_score")


def test_error_rows_count_as_wrong_by_default_and_can_be_excluded() -> None:
    rows = [prediction("Paris", "Paris", row=0), prediction("", "", row=1, error="out of memory")]
    families = resolve(DEFAULT_NAMES)
    wrong = score_predictions(rows, families)
    excluded = score_predictions(rows, families, error_rows="excluded")
    for metric in reported(families):
        assert wrong.values[metric.name][1] == 0.0, metric.name
        assert wrong.reasons[metric.name][1] is None
        assert excluded.reasons[metric.name][1] == "error row"
    assert total(wrong, "exact_match") == 0.5
    assert total(excluded, "exact_match") == 1.0


def test_text_of_an_error_row_never_scores() -> None:
    table = score_predictions([prediction("Paris", "Paris", error="cut off")], resolve(["bleu_score"]))
    assert total(table, "bleu_score") == 0.0


def test_an_id_that_occurs_twice_is_refused_with_its_count() -> None:
    rows = [prediction("a", "a", row=0), prediction("b", "b", row=1), prediction("c", "c", row=0)]
    with pytest.raises(EvaluationError, match="'row-0' occurs 2 times"):
        score_predictions(rows, resolve(["exact_match"]))


def test_no_predictions_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no predictions"):
        score_predictions([], resolve(["exact_match"]))


def test_an_unknown_metric_is_refused_with_the_nearest_name_and_all_there_are() -> None:
    with pytest.raises(EvaluationError) as caught:
        resolve(["blue_score"])
    assert "'blue_score'" in str(caught.value)
    assert "did you mean 'bleu_score'?" in str(caught.value)
    assert all(family.name in str(caught.value) for family in available())


def test_rows_with_the_same_question_share_a_cluster_and_the_system_prompt_counts() -> None:
    rows = [
        Prediction(id="1", question="q"),
        Prediction(id="2", question="q"),
        Prediction(id="3", question="q", system_prompt="s"),
    ]
    first, second, third = score_predictions(rows, resolve(["f1"])).questions
    assert first == second != third


def test_scoring_in_other_processes_gives_the_same_scores() -> None:
    pairs = [(answer, reference) for answer in STRANGE for reference in STRANGE]
    rows = [prediction(answer, reference, row=i) for i, (answer, reference) in enumerate(pairs)]
    families = resolve(("exact_match", "chrf", "rouge_score"))
    here, there = score_predictions(rows, families), score_predictions(rows, families, processes=2)
    assert here.ids == there.ids
    for metric in here.metrics:
        assert np.array_equal(here.statistics[metric.name], there.statistics[metric.name])


def test_every_metric_states_range_direction_source_and_when_it_is_unscored() -> None:
    for metric in reported(available()):
        assert metric.description and metric.source and metric.unscored_when
        assert metric.minimum < metric.maximum
        assert metric.direction in {"higher", "lower", "none"}


def test_evaluation_modules_load_no_torch_and_no_prefect() -> None:
    folder = Path(__file__).parents[2] / "tasks" / "core" / "evaluation"
    imports = "; ".join(
        f"import tasks.core.evaluation.{path.stem}" for path in sorted(folder.glob("[a-z]*.py"))
    )
    check = (
        f"import sys; {imports}; print([m for m in ('torch', 'transformers', 'prefect') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
