"""Packed attention in float16, whose numbers end at 65,504."""

from __future__ import annotations

import pytest
import torch

from tasks.core.generation.engines.packed_attention import _Call


def test_large_scores_beside_a_shared_prefix_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = (torch.full((2, count, 64), 60.0, dtype=torch.float16) for count in (1, 5, 5))
    call = _Call(
        layer=0, query=query[None], key=keys[None], value=values[None], output=query.new_empty(1, 2, 64),
        scale=64**-0.5, window=None, softcap=None, prefix=None,
    )  # fmt: skip
    call.prefix = object()  # type: ignore[assignment]
    monkeypatch.setattr(_Call, "_shared", lambda self: (keys, values))
    assert query[0, 0] @ keys[0, 0] > 65504 or (query[0, 0] @ keys[0, 0]).isinf()
    attended = call._attend(query, keys, values, torch.zeros(2, 1, 10, dtype=torch.float16))
    assert attended.flatten().tolist() == pytest.approx([60.0] * 128)
