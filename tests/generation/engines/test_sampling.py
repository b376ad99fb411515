"""Drawing tokens: right distribution, and a stream that belongs to the row."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.core.generation.engines.sampling import RowStream, TokenChooser
from tasks.core.records import GenerationSettings

DRAWS = 8000


def draw(logits: torch.Tensor, settings: GenerationSettings, count: int = DRAWS) -> Counter[int]:
    chooser = TokenChooser(settings, [])
    streams = [chooser.stream(f"row-{place}") for place in range(count)]
    return Counter(chooser.choose(logits.repeat(count, 1), streams, [0] * count).tolist())


def test_a_rows_numbers_depend_on_seed_and_id_only() -> None:
    first, again, other_row, other_seed = (
        [stream.next() for _ in range(200)]
        for stream in (RowStream(1, "a"), RowStream(1, "a"), RowStream(1, "b"), RowStream(2, "a"))
    )
    assert first == again
    assert first != other_row
    assert first != other_seed
    assert all(0 <= number < 1 for number in first)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    counts = draw(logits, GenerationSettings(do_sample=True))
    expected = (logits[0].double().softmax(-1) * DRAWS).tolist()
    assert chisquare([counts[token] for token in range(5)], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
)
def test_draws_have_the_distribution_of_transformers_own_sampling(settings: dict[str, float]) -> None:
    """Chi-square of our draws against `generate`'s over a vocabulary of eight tokens."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2, eos_token_id=None, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    prompt = torch.tensor([[1, 5, 2]])
    with torch.inference_mode():
        logits = model(prompt).logits[:, -1]
        theirs = model.generate(
            prompt.repeat(DRAWS, 1),
            attention_mask=torch.ones(DRAWS, 3, dtype=torch.long),
            do_sample=True,
            max_new_tokens=1,
            pad_token_id=0,
            **{"top_k": 0, **settings},
        )[:, -1]
    chooser = TokenChooser(GenerationSettings(do_sample=True, **settings), [])
    streams = [chooser.stream(f"row-{place}") for place in range(DRAWS)]
    seen = [chooser.seen(prompt[0].tolist())] * DRAWS
    ours = chooser.choose(logits.repeat(DRAWS, 1), streams, [0] * DRAWS, seen)
    mine, yours = Counter(ours.tolist()), Counter(theirs.tolist())
    seen = sorted(set(mine) | set(yours))
    table = [[mine[token] for token in seen], [yours[token] for token in seen]]
    assert len(seen) > 1
    assert chi2_contingency(table).pvalue > 1e-3


def test_a_token_with_no_probability_is_never_drawn_even_at_the_edges() -> None:
    logits = torch.tensor([[-float("inf"), 1.0, -float("inf"), 1.0, -float("inf")]])
    chooser = TokenChooser(GenerationSettings(do_sample=True), [])

    class Edge(RowStream):
        def __init__(self, value: float) -> None:
            self.value = value

        def next(self) -> float:
            return self.value

    streams = [Edge(0.0), Edge(0.5), Edge(1.0 - 2**-53), Edge(0.499999)]
    chosen = chooser.choose(logits.repeat(4, 1), streams, [0] * 4).tolist()
    assert chosen == [1, 3, 3, 1]


def test_greedy_takes_the_likeliest_token() -> None:
    chooser = TokenChooser(GenerationSettings(), [])
    assert chooser.choose(torch.tensor([[0.0, 3.0, 1.0]]), [None], [0]).tolist() == [1]


def test_the_end_token_is_forbidden_until_the_minimum_is_reached() -> None:
    chooser = TokenChooser(GenerationSettings(min_new_tokens=2), [1])
    logits = torch.tensor([[0.0, 9.0, 1.0]]).repeat(2, 1)
    assert chooser.choose(logits, [None, None], [1, 2]).tolist() == [2, 1]
