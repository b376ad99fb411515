"""Both engines give each row the answer that it gets alone, for every architecture that is covered."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pytest
import torch

from tasks.core.errors import ConfigError
from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines import inflight
from tasks.core.generation.engines.base import Engine, GeneratedRow
from tasks.core.generation.engines.choosing import choose_engine
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.generation.engines.sorted_batches import SortedBatchEngine
from tasks.core.generation.ladder import generate_all
from tasks.core.memory.budget import TokenBudget
from tasks.core.models.loading import LoadedModel
from tasks.core.records import GenerationSettings, ModelIdentity

NEW_TOKENS = 12
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}


def build(name: str, vocabulary: int) -> Any:
    import transformers as tf

    common = {"vocab_size": vocabulary, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    window = {"sliding_window": 8}
    configs = {
        "llama": lambda: tf.LlamaConfig(**GROUPED, **common),
        "llama-tied": lambda: tf.LlamaConfig(**GROUPED, **common, tie_word_embeddings=True),
        "qwen2": lambda: tf.Qwen2Config(**GROUPED, **common),
        "qwen2-sliding": lambda: tf.Qwen2Config(
            **GROUPED, **common, **window, use_sliding_window=True, max_window_layers=1
        ),
        "qwen3": lambda: tf.Qwen3Config(**GROUPED, **common, head_dim=16),
        "mistral": lambda: tf.MistralConfig(**GROUPED, **common, **window),
        "gemma": lambda: tf.GemmaConfig(**GROUPED, **common, head_dim=16),
        "gemma2": lambda: tf.Gemma2Config(**GROUPED, **common, **window, head_dim=16),
        "gemma3": lambda: tf.Gemma3TextConfig(**GROUPED, **common, **window, head_dim=16),
        "gpt-neox": lambda: tf.GPTNeoXConfig(**SIZES, **common, rotary_pct=0.25),
        "gpt2": lambda: tf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, **common
        ),
        "phi": lambda: tf.PhiConfig(**GROUPED, **common, partial_rotary_factor=0.5),
        "phi3": lambda: tf.Phi3Config(**GROUPED, **common),
        "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **common),
    }
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return tf.AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32).eval()


def loaded(model: Any, tokenizer: Any) -> LoadedModel:
    identity = ModelIdentity(
        model_id="tiny",
        weights_sha256="0",
        dtype="float32",
        chat_template_sha256="0",
        vocab_size=len(tokenizer),
    )
    return LoadedModel(model=model, tokenizer=tokenizer, identity=identity, device="cpu")


def prompts(count: int, vocabulary: int, *, shared: int = 0, seed: int = 5) -> list[tuple[int, ...]]:
    source = random.Random(seed)
    head = tuple(source.randrange(4, vocabulary) for _ in range(shared))
    return [
        head + tuple(source.randrange(4, vocabulary) for _ in range(source.randrange(3, 60)))
        for _ in range(count)
    ]


def queue_of(
    texts: list[tuple[int, ...]], *, shared: int = 0, new_tokens: int | Sequence[int] = NEW_TOKENS
) -> RequestQueue:
    lengths = [new_tokens] * len(texts) if isinstance(new_tokens, int) else new_tokens
    requests = [
        Request(place, f"row-{place}", text, length)
        for place, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    return RequestQueue(
        range(len(texts)), list(map(len, texts)), requests.__getitem__,
        shared_prefix=texts[0][:shared], largest_answer_tokens=max(lengths),
    )  # fmt: skip


def unequal(answers: list[list[int]]) -> list[list[int]]:
    """Beginnings of them, 2 tokens to 12, so that rows leave at all times and others enter beside rows that stay."""
    return [answer[: 2 + 5 * place % 11] for place, answer in enumerate(answers)]


def answers(
    engine: Engine, queue: RequestQueue, *, rows: int = 64, tokens: int = 10**6
) -> dict[int, GeneratedRow]:
    return {row.position: row for row in engine.generate(queue, TokenBudget(tokens, rows))}


def alone(
    model: Any, texts: list[tuple[int, ...]], new_tokens: int = NEW_TOKENS, **settings: Any
) -> list[list[int]]:
    """What transformers' own `generate` answers to each prompt by itself; so little work is done by one thread.

    A greedy answer need not be computed token by token to be known: one that is guessed, all prompts in a batch, is
    it where a plain pass over the row alone, without cache and padding, chooses each of its tokens.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    is_greedy = settings.keys() <= {"eos_token_id"} and not getattr(model, "is_quantized", False)
    guesses: list[list[int]] = [[] for _ in texts]
    if is_greedy and len(texts) > 1:
        guesses = _generated(model, texts, new_tokens, settings)
    results = [
        guess
        if guess and _is_chosen(model, text, guess)
        else _generated(model, [text], new_tokens, settings)[0]
        for text, guess in zip(texts, guesses, strict=True)
    ]
    torch.set_num_threads(threads)
    return results


def _generated(
    model: Any, texts: list[tuple[int, ...]], new_tokens: int, settings: dict[str, Any]
) -> list[list[int]]:
    """The answers of one `generate`, each up to its end token."""
    longest = max(map(len, texts))
    ids = torch.tensor([(0,) * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **settings
    )
    ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    found = []
    for tokens in out[:, longest:].tolist():
        end = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(tokens[:end])
    return found


def _is_chosen(model: Any, text: tuple[int, ...], answer: list[int]) -> bool:
    """Whether each token of the answer is the likeliest one there, in one pass over prompt and answer."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*text, *answer]]), use_cache=False).logits
    return bool(logits[0, len(text) - 1 : -1].argmax(-1).tolist() == answer)


COVERED = [
    "llama", "llama-tied", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt-neox",
    "gpt2", "phi", "phi3",
]  # fmt: skip


@pytest.mark.parametrize("architecture", COVERED)
def test_in_flight_answers_equal_those_of_each_row_alone(
    architecture: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(architecture, len(tiny_tokenizer))
    texts = prompts(66, len(tiny_tokenizer), shared=20)
    expected = unequal(alone(model, texts))
    engine = InflightEngine(loaded(model, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    engine._eos, engine._stop._eos = (), frozenset()
    assert engine.unsupported() is None
    few, some, every = slice(3), slice(20), slice(66)  # few at a time take long
    for rows, shared, part in [(1, 0, few), (7, 20, some), (7, 0, some), (64, 20, every), (64, 0, every)]:
        assert found(engine, texts[part], expected[part], rows, shared) == expected[part], (rows, shared)
    # A long prefix is not copied into each slot but read in one place.
    monkeypatch.setattr(inflight, "SMALLEST_ATTENDED_PREFIX", 16)
    for rows, part in [(1, few), (7, some), (64, every)]:
        assert found(engine, texts[part], expected[part], rows, 20) == expected[part], rows
    monkeypatch.setattr(inflight, "PREFILL_TOKENS_CPU", 23)
    stretched = InflightEngine(loaded(model, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    stretched._eos, stretched._stop._eos = (), frozenset()
    assert found(stretched, texts[some], expected[some], 7, 20) == expected[some]
    assert found(engine, texts[19::-1], expected[19::-1], 7, 0) == expected[19::-1]


def found(
    engine: Engine, texts: list[tuple[int, ...]], expected: list[list[int]], rows: int, shared: int
) -> list[list[int]]:
    """What the engine answers where each row may have as many tokens as it is expected to."""
    queue = queue_of(texts, shared=shared, new_tokens=list(map(len, expected)))
    got = answers(engine, queue, rows=rows)
    return [list(got[place].token_ids) for place in range(len(texts))]


def test_prompts_longer_than_a_step_enter_in_stretches(tiny_tokenizer: Any) -> None:
    model = build("mistral", len(tiny_tokenizer))
    texts = prompts(12, len(tiny_tokenizer))
    engine = InflightEngine(loaded(model, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    engine._eos, engine._stop._eos, engine._prefill_tokens = (), frozenset(), 16
    got = answers(engine, queue_of(texts), rows=5)
    assert [list(got[place].token_ids) for place in range(len(texts))] == alone(model, texts)


def test_a_model_with_other_positions_falls_back_with_the_reason(tiny_tokenizer: Any) -> None:
    model = build("bloom", len(tiny_tokenizer))
    choice = choose_engine("auto", loaded(model, tiny_tokenizer), GenerationSettings())
    assert choice.engine.name == "generate"
    assert choice.reason is not None
    assert "BloomForCausalLM" in choice.reason


def test_beam_search_falls_back_to_generate(tiny_model: Any, tiny_tokenizer: Any) -> None:
    choice = choose_engine("inflight", loaded(tiny_model, tiny_tokenizer), GenerationSettings(num_beams=2))
    assert choice.engine.name == "generate"
    assert choice.reason == "inflight: beam search"


class Instant:
    """An engine of the user's own: answers every prompt at once."""

    name = "instant"

    def __init__(self, model: LoadedModel, settings: GenerationSettings) -> None:
        self.settings = settings

    def unsupported(self) -> str | None:
        return "stop strings" if self.settings.stop_strings else None

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        while queue:
            for request in queue.take_batch(budget.limit_tokens, budget.max_rows):
                queue.finish(request.position)
                yield GeneratedRow(request.position, (), "now", "stop", 0.0, 1)


def test_an_engine_of_ones_own_is_named_by_module_and_class(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = loaded(tiny_model, tiny_tokenizer)
    assert (
        choose_engine(
            "tests.generation.engines.test_engines:Instant", model, GenerationSettings()
        ).engine.name
        == "instant"
    )
    other = choose_engine(
        "tests.generation.engines.test_engines:Instant", model, GenerationSettings(stop_strings=("x",))
    )
    assert other.engine.name == "inflight"
    assert other.reason == "tests.generation.engines.test_engines:Instant: stop strings"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no_such_module:X", "No module named"), ("tests.generation.engines.test_engines:Nothing", "no attribute"),
     ("tests.generation.engines.test_engines:queue_of", "lacks name")],
)  # fmt: skip
def test_what_is_no_engine_is_refused_with_the_reason(
    name: str, reason: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose_engine(name, loaded(tiny_model, tiny_tokenizer), GenerationSettings())


@pytest.fixture(params=[InflightEngine, SortedBatchEngine], ids=lambda engine: engine.name)
def engine_class(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_answer_ends_with_any_of_the_end_tokens(
    engine_class: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = prompts(20, len(tiny_tokenizer))
    free = alone(tiny_model, texts, eos_token_id=None)
    ends = (free[0][3], free[1][5])
    engine = engine_class(loaded(tiny_model, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    engine._eos, engine._stop._eos = ends, frozenset(ends)
    got = answers(engine, queue_of(texts), rows=6)
    for place, tokens in enumerate(free):
        cut = next((number + 1 for number, token in enumerate(tokens) if token in ends), len(tokens))
        assert list(got[place].token_ids) == tokens[:cut]
        assert got[place].finish_reason == ("stop" if tokens[cut - 1] in ends else "length")


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(
    engine_class: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = prompts(8, len(tiny_tokenizer))
    plain = engine_class(loaded(tiny_model, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    first = answers(plain, queue_of(texts))
    target = first[2].text
    stop = target[len(target) // 2 : len(target) // 2 + 3]
    engine = engine_class(
        loaded(tiny_model, tiny_tokenizer),
        GenerationSettings(max_new_tokens=NEW_TOKENS, stop_strings=(stop,)),
    )
    got = answers(engine, queue_of(texts))
    assert got[2].text == target.partition(stop)[0]
    assert got[2].finish_reason == "stop"
    assert all(stop not in row.text for row in got.values())


def test_the_minimum_length_holds(engine_class: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    texts = prompts(10, len(tiny_tokenizer))
    end = alone(tiny_model, texts, eos_token_id=None)[0][0]
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, min_new_tokens=4)
    engine = engine_class(loaded(tiny_model, tiny_tokenizer), settings)
    engine._eos, engine._stop._eos = (end,), frozenset((end,))
    if engine_class is InflightEngine:
        assert min(len(row.token_ids) for row in answers(engine, queue_of(texts)).values()) >= 4
    else:
        got = answers(engine, queue_of(texts))
        assert all(end not in row.token_ids[:4] for row in got.values())


@pytest.mark.parametrize(
    "sampled",
    [
        {"do_sample": True, "temperature": 0.9, "min_p": 0.05},
        {"do_sample": True, "top_k": 20, "repetition_penalty": 1.3},
    ],
)
def test_sampled_answers_depend_on_row_and_seed_only(
    sampled: dict[str, Any], tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = prompts(10, len(tiny_tokenizer))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, **sampled)
    model = loaded(tiny_model, tiny_tokenizer)
    runs = [
        answers(engine(model, settings), queue_of(texts), rows=rows)
        for engine in (InflightEngine, SortedBatchEngine)
        for rows in (1, 4, 32)
    ]
    first = {place: row.token_ids for place, row in runs[0].items()}
    assert all({place: row.token_ids for place, row in run.items()} == first for run in runs)
    other = answers(InflightEngine(model, settings.model_copy(update={"seed": 7})), queue_of(texts))
    assert {place: row.token_ids for place, row in other.items()} != first


def test_repetition_penalty_equals_transformers_own(
    engine_class: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = prompts(10, len(tiny_tokenizer))
    expected = alone(tiny_model, texts, repetition_penalty=1.5, eos_token_id=None)
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, repetition_penalty=1.5)
    engine = engine_class(loaded(tiny_model, tiny_tokenizer), settings)
    engine._eos, engine._stop._eos = (), frozenset()
    got = answers(engine, queue_of(texts), rows=4)
    assert [list(got[place].token_ids) for place in range(len(texts))] == expected


def test_the_token_budget_bounds_what_is_in_flight(
    engine_class: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = prompts(30, len(tiny_tokenizer))
    held: list[tuple[int, int]] = []

    class Watched(TokenBudget):
        def admit(self, rows: int, tokens: int, alone: str | None = None) -> None:
            held.append((rows, tokens))
            assert (alone is not None) == (rows == 1)
            super().admit(rows, tokens, alone)

    engine = engine_class(loaded(tiny_model, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    rows = list(engine.generate(queue_of(texts), Watched(200, 64)))
    assert len(rows) == 30
    assert max(rows for rows, _ in held) > 1
    assert all(tokens <= 200 or rows == 1 for rows, tokens in held)


def test_an_injected_out_of_memory_changes_no_answer(
    engine_class: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = prompts(30, len(tiny_tokenizer), shared=20)
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, do_sample=True)
    engine = engine_class(loaded(tiny_model, tiny_tokenizer), settings)
    undisturbed = {place: row.token_ids for place, row in answers(engine, queue_of(texts)).items()}
    failures = iter([True, False, False, True, False, True])

    class Failing:
        name = "failing"

        def unsupported(self) -> None:
            return None

        def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
            for count, row in enumerate(engine.generate(queue, budget)):
                yield row
                if count == 2 and next(failures, False):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    budget = TokenBudget(2000, 16)
    rows = list(generate_all(Failing(), queue_of(texts, shared=20), budget, device="cpu"))
    assert {row.position: row.token_ids for row in rows} == undisturbed
    assert len(rows) == len(texts)


def test_the_models_own_attention_is_back_after_generating(tiny_model: Any, tiny_tokenizer: Any) -> None:
    before = tiny_model.config._attn_implementation
    engine = InflightEngine(loaded(tiny_model, tiny_tokenizer), GenerationSettings(max_new_tokens=2))
    running = engine.generate(queue_of(prompts(4, len(tiny_tokenizer))), TokenBudget(10**6, 2))
    next(running)
    assert isinstance(running, Generator)
    running.close()
    assert tiny_model.config._attn_implementation == before


def test_lora_adapters_are_covered(tiny_model_dir: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    texts = prompts(12, len(tiny_tokenizer))
    expected = alone(adapted, texts, eos_token_id=None)
    engine = InflightEngine(loaded(adapted, tiny_tokenizer), GenerationSettings(max_new_tokens=NEW_TOKENS))
    engine._eos, engine._stop._eos = (), frozenset()
    assert engine.unsupported() is None
    got = answers(engine, queue_of(texts), rows=5)
    assert [list(got[place].token_ids) for place in range(len(texts))] == expected


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_are_covered(bits: str, tiny_model_dir: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer

    quantised = load_model_and_tokenizer(
        ModelSpec(
            str(tiny_model_dir), dtype="float32", device="cpu",
            load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit",
        )
    )  # fmt: skip
    engine = InflightEngine(quantised, GenerationSettings(max_new_tokens=NEW_TOKENS))
    engine._eos, engine._stop._eos = (), frozenset()
    assert engine.unsupported() is None
    texts = prompts(8, len(quantised.tokenizer))
    one_by_one = answers(engine, queue_of(texts), rows=1)
    together = answers(engine, queue_of(texts), rows=8)
    expected = alone(quantised.model, texts, eos_token_id=None)
    same = [
        list(one_by_one[place].token_ids) == expected[place]
        and together[place].token_ids == one_by_one[place].token_ids
        for place in range(len(texts))
    ]
    # 8-bit activations are rounded with a scale of their row; a tie may fall otherwise in another batch.
    assert sum(same) >= (len(texts) if bits == "4bit" else len(texts) - 2)
