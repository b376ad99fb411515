"""Rows that share a step do not change each other's answers, also where a model or a thread makes them depend."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tasks.core.generation.engines.choosing import choose_engine
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.generation.engines.sorted_batches import SortedBatchEngine
from tasks.core.records import GenerationSettings
from tests.generation.engines.test_engines import (
    GROUPED,
    NEW_TOKENS,
    alone,
    answers,
    build,
    loaded,
    prompts,
    queue_of,
)

SETTINGS = GenerationSettings(max_new_tokens=NEW_TOKENS)
LONG = {key: value for key, value in GROUPED.items() if key != "max_position_embeddings"}


def without_end(engine: Any) -> Any:
    engine._eos, engine._stop._eos = (), frozenset()
    return engine


def length_dependent(kind: str, vocabulary: int) -> Any:
    """A model whose rotary frequencies change beyond 64 positions."""
    import transformers as tf

    common = {"vocab_size": vocabulary, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    }
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    configs = {
        "longrope": lambda: tf.Phi3Config(
            **LONG, **common, max_position_embeddings=512, original_max_position_embeddings=64,
            rope_parameters=longrope,
        ),
        "dynamic": lambda: tf.LlamaConfig(
            **LONG, **common, max_position_embeddings=64, rope_parameters=dynamic
        ),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return tf.AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_long_row_does_not_change_the_rotary_positions_of_short_rows(
    kind: str, tiny_tokenizer: Any
) -> None:
    model = length_dependent(kind, len(tiny_tokenizer))
    source = random.Random(3)
    texts = [
        tuple(source.randrange(4, len(tiny_tokenizer)) for _ in range(n)) for n in [8] * 4 + [150] * 3 + [60]
    ]
    expected: list[list[int]] = []
    for text in texts:
        model(input_ids=torch.tensor([[5]]))  # as fresh: dynamic scaling remembers the longest row so far
        expected += alone(model, [text])
    choice = choose_engine("auto", loaded(model, tiny_tokenizer), SETTINGS, longest_tokens=200)
    assert choice.engine.name == "generate"
    assert choice.reason is not None and "beyond 64 tokens" in choice.reason
    got = answers(without_end(choice.engine), queue_of(texts))
    assert [list(got[place].token_ids) for place in range(len(texts))] == expected
    short = choose_engine("auto", loaded(model, tiny_tokenizer), SETTINGS, longest_tokens=64)
    assert short.engine.name == "inflight"


def test_chunked_attention_is_left_to_generate(tiny_tokenizer: Any) -> None:
    import transformers as tf

    config = tf.Llama4TextConfig(
        **LONG, vocab_size=len(tiny_tokenizer), head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
        num_experts_per_tok=1, attention_chunk_size=64, moe_layers=[], no_rope_layers=[1, 1],
        layer_types=["chunked_attention"] * 2, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    choice = choose_engine("auto", loaded(model, tiny_tokenizer), SETTINGS)
    assert choice.engine.name == "generate"
    assert choice.reason is not None and "chunked attention" in choice.reason


def test_a_wide_window_that_only_the_models_mask_knows_is_left_to_generate(tiny_tokenizer: Any) -> None:
    import transformers as tf

    config = tf.PhimoeConfig(
        **LONG, vocab_size=len(tiny_tokenizer), num_local_experts=4, num_experts_per_tok=2, sliding_window=300,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reason = InflightEngine(loaded(model, tiny_tokenizer), SETTINGS).unsupported()
    assert reason is not None and "window of 300" in reason


def test_two_threads_generate_with_two_models_at_once(tiny_tokenizer: Any) -> None:
    models = [build(name, len(tiny_tokenizer)) for name in ("llama", "qwen3")]
    texts = prompts(30, len(tiny_tokenizer))
    expected = [alone(model, texts) for model in models]

    def generate(model: Any) -> list[list[int]]:
        got = answers(
            without_end(InflightEngine(loaded(model, tiny_tokenizer), SETTINGS)), queue_of(texts), rows=7
        )
        return [list(got[place].token_ids) for place in range(len(texts))]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(generate, models)) == expected


def test_a_long_prompt_may_end_with_its_first_token(tiny_tokenizer: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    texts = prompts(6, len(tiny_tokenizer))
    engine = without_end(InflightEngine(loaded(model, tiny_tokenizer), SETTINGS))
    engine._prefill_tokens = 16
    got = answers(engine, queue_of(texts, new_tokens=1))
    assert [list(got[place].token_ids) for place in range(len(texts))] == alone(model, texts, 1)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_stop_string_that_the_prompt_begins_does_not_end_the_answer(rows: int, tiny_tokenizer: Any) -> None:
    model = build("llama", len(tiny_tokenizer))
    texts = prompts(12, len(tiny_tokenizer))
    answered = alone(model, texts)
    # The last token of the first prompt and the first of its answer, as one text.
    across = tiny_tokenizer.decode([texts[0][-1], answered[0][0]])
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop_strings=(across,))
    results = [
        answers(without_end(engine(loaded(model, tiny_tokenizer), settings)), queue_of(texts), rows=rows)
        for engine in (InflightEngine, SortedBatchEngine)
    ]
    flying, batched = ({place: row.token_ids for place, row in result.items()} for result in results)
    assert flying == batched
    assert len(flying[0]) == NEW_TOKENS


def test_beams_count_against_the_token_limit(tiny_model: Any, tiny_tokenizer: Any) -> None:
    from tasks.core.memory.budget import TokenBudget

    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, num_beams=4)
    engine = SortedBatchEngine(loaded(tiny_model, tiny_tokenizer), settings)
    budget, held = TokenBudget(400, 64), []
    budget.on_admit = lambda rows, tokens, alone: held.append((rows, tokens))
    list(engine.generate(queue_of(prompts(10, len(tiny_tokenizer))), budget))
    assert all(tokens <= 400 or rows == 1 for rows, tokens in held)
