"""Reference scores: each row's is that of the row alone, in unpadded steps and in padded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.core.generation import likelihood, reference_scorer
from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines import inflight
from tasks.core.generation.engines.rotary import independent_tokens
from tasks.core.generation.ladder import generate_all
from tasks.core.generation.reference_scorer import ReferenceScorer
from tasks.core.memory.budget import TokenBudget
from tests.generation.engines.test_engines import COVERED, build, loaded, prompts

SHARED = 20


def texts_of(tokenizer: Any, count: int = 16) -> dict[int, tuple[tuple[int, ...], int]]:
    """By position the token ids of prompt and reference, and where the reference begins."""
    texts = prompts(count, len(tokenizer), shared=SHARED)
    return {place: (text, SHARED + 1 + place % (len(text) - SHARED - 1)) for place, text in enumerate(texts)}


def alone(model: Any, texts: dict[int, tuple[tuple[int, ...], int]]) -> dict[int, float]:
    losses = {}
    for place, (text, start) in texts.items():
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([text]), use_cache=False).logits[0].log_softmax(dim=-1)
        losses[place] = -sum(float(scores[token - 1, text[token]]) for token in range(start, len(text)))
    return losses


def scored(
    model: Any, tokenizer: Any, texts: dict[int, tuple[tuple[int, ...], int]], *, packs: bool, **budget: int
) -> dict[int, float]:
    requests = {place: Request(place, str(place), text, 0) for place, (text, _) in texts.items()}
    lengths = [len(request.token_ids) for request in requests.values()]
    prefix = requests[0].token_ids[:SHARED]
    queue = RequestQueue(list(requests), lengths, requests.__getitem__, shared_prefix=prefix)
    starts = {place: start for place, (_, start) in texts.items()}
    scorer = ReferenceScorer(loaded(model, tokenizer), starts, packs=packs)
    limits = TokenBudget(budget.get("limit_tokens", 10**6), budget.get("max_rows", 64))
    rows = list(generate_all(scorer, queue, limits, device="cpu"))
    assert sorted(row.position for row in rows) == sorted(texts)
    assert {row.finish_reason for row in rows} == {"stop"}
    return scorer.losses


@pytest.mark.parametrize("architecture", COVERED)
def test_unpadded_steps_give_the_figures_of_padded_batches_and_of_each_row_alone(
    architecture: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(architecture, len(tiny_tokenizer))
    texts = texts_of(tiny_tokenizer)
    assert likelihood._packs(loaded(model, tiny_tokenizer))
    expected = pytest.approx(alone(model, texts), rel=1e-5)
    assert scored(model, tiny_tokenizer, texts, packs=False) == expected
    assert scored(model, tiny_tokenizer, texts, packs=True) == expected
    assert scored(model, tiny_tokenizer, texts, packs=True, max_rows=3) == expected
    # A long prefix is read in one place, and a row longer than a step goes through it in stretches.
    monkeypatch.setattr(inflight, "SMALLEST_ATTENDED_PREFIX", 16)
    assert scored(model, tiny_tokenizer, texts, packs=True) == expected
    monkeypatch.setattr(reference_scorer, "_SMALLEST_STRETCH_TOKENS", 7)
    assert scored(model, tiny_tokenizer, texts, packs=True, limit_tokens=40) == expected


def test_a_model_that_packed_attention_does_not_cover_is_scored_in_padded_batches(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = build("bloom", len(tiny_tokenizer))
    assert not likelihood._packs(loaded(model, tiny_tokenizer))
    assert "scored in padded batches: BloomForCausalLM" in caplog.text
    texts = texts_of(tiny_tokenizer, 12)
    assert scored(model, tiny_tokenizer, texts, packs=False) == pytest.approx(alone(model, texts), rel=1e-5)


def test_a_long_row_changes_no_score_where_rotary_positions_depend_on_the_longest(
    tiny_tokenizer: Any,
) -> None:
    import transformers as tf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlamaConfig(
        vocab_size=len(tiny_tokenizer), max_position_embeddings=40, initializer_range=0.3,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, **sizes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert independent_tokens(model) == 40
    texts = texts_of(tiny_tokenizer, 12)
    assert {len(text) > 40 for text, _ in texts.values()} == {True, False}
    expected = {}
    for place, one in texts.items():
        with torch.inference_mode():
            model(input_ids=torch.tensor([one[0][:1]]), use_cache=False)  # takes back what a long row has set
        expected.update(alone(model, {place: one}))
    assert scored(model, tiny_tokenizer, texts, packs=False) == pytest.approx(expected, rel=1e-5)
