"""Logits that are no numbers: the row says so, and no other row feels it, whichever engine answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.core.errors import NoAnswerError
from tasks.core.generation.batching import Request
from tasks.core.generation.engines import inflight
from tasks.core.generation.engines.choosing import choose_engine
from tasks.core.generation.engines.faults import IMPOSSIBLE, INFINITE, NAN
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.generation.engines.sampling import TokenChooser
from tasks.core.generation.engines.slots import Row, SlotCache
from tasks.core.generation.engines.sorted_batches import SortedBatchEngine
from tasks.core.generation.streaming import stream_answer
from tasks.core.models.broken_weights import broken_weights
from tasks.core.models.loading import LoadedModel
from tasks.core.records import GenerationSettings, Prompt
from tests.generation.engines.test_engines import answers, build, loaded, prompts, queue_of

BROKEN, VOCABULARY, NEW_TOKENS = 7, 512, 6
NOT_A_NUMBER = float("nan")
ENGINES = [InflightEngine, SortedBatchEngine]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalty": {"repetition_penalty": 1.3, "min_new_tokens": 2},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "min_new_tokens": 1},
}
COVERED = {
    InflightEngine: {"greedy", "sampled", "penalty"},
    SortedBatchEngine: set(SETTINGS),
}


def texts_with(broken: set[int], count: int = 14, *, shared: int = 0) -> list[tuple[int, ...]]:
    """Prompts of which those at the places in `broken` hold the token BROKEN, and no other does."""
    texts = [
        tuple(8 if token == BROKEN else token for token in text)
        for text in prompts(count, VOCABULARY, shared=shared)
    ]
    middle = {place: shared + (len(texts[place]) - shared) // 2 for place in broken}
    return [
        (*text[: middle[place]], BROKEN, *text[middle[place] + 1 :]) if place in broken else text
        for place, text in enumerate(texts)
    ]


def with_broken_token(model: Any, token: int = BROKEN, value: float = NOT_A_NUMBER) -> Any:
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    return model


def engine_of(kind: Any, model: LoadedModel, **settings: Any) -> Any:
    engine = kind(model, GenerationSettings(max_new_tokens=NEW_TOKENS, **settings))
    assert engine.unsupported() is None
    return engine


@pytest.mark.parametrize(
    ("kind", "decoding"),
    [(kind, decoding) for kind in ENGINES for decoding in SETTINGS if decoding in COVERED[kind]],
)
def test_a_row_of_nan_is_an_error_row_and_the_others_answer_as_without_it(
    kind: Any, decoding: str, tiny_tokenizer: Any
) -> None:
    settings = SETTINGS[decoding]
    broken = {0, 3, 4, 9, 13}
    texts = texts_with(broken)
    whole = engine_of(kind, loaded(build("llama", VOCABULARY), tiny_tokenizer), **settings)
    sound = answers(whole, queue_of(texts, new_tokens=NEW_TOKENS))
    model = loaded(with_broken_token(build("llama", VOCABULARY)), tiny_tokenizer)
    for rows in (4, 64):  # few at once: the slots of the broken rows are used again
        got = answers(engine_of(kind, model, **settings), queue_of(texts, new_tokens=NEW_TOKENS), rows=rows)
        assert {place for place, row in got.items() if row.finish_reason == "error"} == broken
        for place, row in got.items():
            if place in broken:
                assert row.text.startswith("the model's logits are NaN at new token 1 (1 weight holds NaN")
                assert "embed_tokens" in row.text and row.token_ids == ()
            else:
                assert row.token_ids == sound[place].token_ids


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_an_answer_that_becomes_nan_on_the_way_says_at_which_token(kind: Any, tiny_tokenizer: Any) -> None:
    texts = texts_with(set())
    sound = answers(
        engine_of(kind, loaded(build("llama", VOCABULARY), tiny_tokenizer)),
        queue_of(texts, new_tokens=NEW_TOKENS),
    )
    token = sound[2].token_ids[2]
    first = {place: row.token_ids.index(token) for place, row in sound.items() if token in row.token_ids[:-1]}
    spared = {place for place, text in enumerate(texts) if token not in text and place not in first}
    assert first[2] <= 2 and len(spared) > 3
    model = loaded(with_broken_token(build("llama", VOCABULARY), token), tiny_tokenizer)
    got = answers(engine_of(kind, model), queue_of(texts, new_tokens=NEW_TOKENS), rows=4)
    for place, at in first.items():
        if token not in texts[place]:
            assert got[place].text.startswith(f"the model's logits are NaN at new token {at + 2} (")
    assert all(got[place].token_ids == sound[place].token_ids for place in spared)


def test_nan_stays_in_its_row_beside_a_shared_prefix_and_in_a_prompt_that_enters_in_stretches(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {1, 5, 6}
    texts = texts_with(broken, shared=140)
    sound = answers(
        engine_of(InflightEngine, loaded(build("llama", VOCABULARY), tiny_tokenizer)),
        queue_of(texts, shared=140, new_tokens=NEW_TOKENS),
    )
    model = loaded(with_broken_token(build("llama", VOCABULARY)), tiny_tokenizer)
    engine = engine_of(InflightEngine, model)
    monkeypatch.setattr(engine, "_prefill_tokens", 16)
    for smallest in (128, 10**6):  # read in one place; copied into each slot
        monkeypatch.setattr(inflight, "SMALLEST_ATTENDED_PREFIX", smallest)
        got = answers(engine, queue_of(texts, shared=140, new_tokens=NEW_TOKENS), rows=3)
        assert {place for place, row in got.items() if row.finish_reason == "error"} == broken
        assert all(got[place].token_ids == sound[place].token_ids for place in got if place not in broken)


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_an_overflow_of_float16_in_some_rows_leaves_the_others_and_names_its_cause(
    kind: Any, tiny_tokenizer: Any
) -> None:
    def answered(texts: list[tuple[int, ...]]) -> Any:
        model = build("llama", VOCABULARY).half()
        with torch.no_grad():
            model.get_input_embeddings().weight[BROKEN] = 65504.0
            model.model.layers[0].self_attn.o_proj.weight.mul_(500)
        half = loaded(model, tiny_tokenizer)
        half = LoadedModel(
            half.model, half.tokenizer, half.identity.model_copy(update={"dtype": "float16"}), half.device
        )
        return answers(kind(half, GenerationSettings(max_new_tokens=NEW_TOKENS)), queue_of(texts), rows=5)

    broken = {2, 8}
    texts = texts_with(broken)
    replaced = [tuple(8 if token == BROKEN else token for token in text) for text in texts]
    got, sound = answered(texts), answered(replaced)  # the same shapes, so the same rounding
    assert not [row for row in sound.values() if row.finish_reason == "error"]
    assert {place for place, row in got.items() if row.finish_reason == "error"} == broken
    assert all(got[place].token_ids == sound[place].token_ids for place in got if place not in broken)
    assert "all weights are finite, so a value overflowed float16" in got[2].text


def test_padding_whose_weights_are_nan_reaches_no_row_of_a_padded_batch(tiny_tokenizer: Any) -> None:
    pad = tiny_tokenizer.pad_token_id
    texts = [tuple(8 if token == pad else token for token in text) for text in texts_with(set())]
    sound = answers(
        engine_of(SortedBatchEngine, loaded(build("llama", VOCABULARY), tiny_tokenizer)), queue_of(texts)
    )
    model = loaded(with_broken_token(build("llama", VOCABULARY), pad), tiny_tokenizer)
    got = answers(engine_of(SortedBatchEngine, model), queue_of(texts))
    assert {place: row.token_ids for place, row in got.items()} == {
        place: row.token_ids for place, row in sound.items()
    }


def test_one_broken_token_does_not_make_the_model_unfit_for_in_flight_batching(tiny_tokenizer: Any) -> None:
    for token in range(0, VOCABULARY, 90):
        model = loaded(with_broken_token(build("llama", VOCABULARY), token), tiny_tokenizer)
        assert InflightEngine(model, GenerationSettings()).unsupported() is None


def test_a_model_that_gives_nothing_but_nan_is_not_called_different_with_packed_attention(
    tiny_tokenizer: Any,
) -> None:
    model = build("llama", VOCABULARY)
    with torch.no_grad():
        model.model.norm.weight[3] = NOT_A_NUMBER
    assert broken_weights(model) == ["model.norm.weight"]
    choice = choose_engine("auto", loaded(model, tiny_tokenizer), GenerationSettings(max_new_tokens=4))
    assert choice.engine.name == "generate"
    assert choice.reason is not None and "gives NaN or infinity" in choice.reason and "%" not in choice.reason
    got = answers(choice.engine, queue_of(texts_with(set(), 3)))
    assert all(row.text.endswith("or its training diverged)") for row in got.values())


def test_streaming_ends_with_an_error_and_not_with_an_empty_answer(tiny_tokenizer: Any) -> None:
    model = loaded(with_broken_token(build("llama", VOCABULARY)), tiny_tokenizer)
    for settings in ({}, {"do_sample": True}):
        pieces = stream_answer(
            model, Prompt("a", (9, BROKEN, 12)), GenerationSettings(max_new_tokens=4, **settings)
        )
        with pytest.raises(NoAnswerError, match="NaN at new token 1"):
            assert list(pieces) == []


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "top_p": 0.9}, {"repetition_penalty": 2.0}, {"min_new_tokens": 3}],
)
def test_the_chooser_marks_rows_without_a_largest_number_and_no_others(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    chooser = TokenChooser(GenerationSettings(**settings), [5])
    logits = torch.zeros(5, 40)
    logits[0, 3] = NOT_A_NUMBER
    logits[1, 3] = float("inf")
    logits[2] = -float("inf")
    logits[3, 3] = -float("inf")  # rules one token out
    logits[4, 5] = NOT_A_NUMBER  # the end token, which may be forbidden
    rows = range(5)
    chosen = chooser.choose(
        logits.to(dtype),
        [chooser.stream(str(row)) for row in rows],
        [0] * 5,
        [chooser.seen([1, 2]) for _ in rows],
    ).tolist()
    assert chosen[:3] == [NAN, INFINITE, IMPOSSIBLE]
    assert chosen[3] >= 0 and chosen[4] == NAN


def test_a_temperature_near_zero_takes_the_likeliest_token() -> None:
    chooser = TokenChooser(GenerationSettings(do_sample=True, temperature=1e-40), [])
    logits = torch.tensor([[1.0, 30.0, 29.0], [-5.0, -70.0, -6.0]])
    assert chooser.choose(logits, [chooser.stream("a"), chooser.stream("b")], [0, 0]).tolist() == [1, 0]


@pytest.mark.parametrize("clears", [False, True])
def test_nothing_stays_in_a_slot_that_is_cleared(clears: bool) -> None:
    cache = SlotCache(max_width=64, clears=clears)
    rows = [Row(Request(place, str(place), (1,) * 20, 4), None, 0.0, cached=20) for place in range(3)]
    for row in rows:
        cache.add(row, 24)
    pool = cache.pools[0]
    states = torch.full((1, 2, 1, 4), float("inf"))
    store = pool.layer(0, states, states)
    store.keys[:, :20] = store.values[:, :20] = float("inf")
    cache.remove(rows[0], clear=True)
    assert not store.of_slot(0, 64)[0].any() and not store.of_slot(0, 64)[1].any()
    list(cache.active())  # the last row takes the free place, and leaves its own
    cache.remove(rows[1])
    assert rows[2].slot == 0 and bool(store.of_slot(0, 20)[0].isinf().all())
    if clears:
        assert not store.keys[2:].any() and not store.values[2:].any()


def test_the_tokens_a_row_has_seen_are_those_of_prompt_and_answer() -> None:
    chooser = TokenChooser(GenerationSettings(repetition_penalty=1.2), [])
    seen = chooser.seen([5, 5, 9])
    assert seen is not None
    for token in (9, 3, *range(100, 300), 3):
        seen.add(token)
    assert sorted(seen.ids.tolist()) == [3, 5, 9, *range(100, 300)]
    assert TokenChooser(GenerationSettings(), []).seen([1]) is None
