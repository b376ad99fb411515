"""Attention over a packed step: tokens of many rows, decoding or prefilling, in one forward pass.

All tokens of a step lie in one sequence of shape [1, tokens], so that the model's linear layers see no padding.
This attention function writes the new keys and values into the rows' slots and attends each token to its own
row only. It is registered under `NAME` in transformers' AttentionInterface; models are not modified.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.core.generation.engines.slots import Pool, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "tuneproof_packed"
# Queries of a prompt are taken in blocks: each block attends to the keys up to its end only, which halves the
# work, and its scores stay in the processor's cache.
QUERY_BLOCK = 128


@dataclass
class DecodeGroup:
    """Rows of one pool that decode: token places [start, end) of the step, one token a row, slot order."""

    pool: Pool
    start: int
    end: int
    lengths: torch.Tensor
    """Tokens each row has after this step, int64 [rows]."""
    shared: int = 0
    """Tokens of the shared prefix, which are not in the slots."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    places: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def mask(self, window: int | None, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """0 where a row may look, -inf elsewhere; shape [rows x heads, 1, shared + width]."""
        import torch

        mask = self.masks.get((window, heads))
        if mask is None:
            steps = torch.arange(self.shared + self.pool.width, device=self.lengths.device)
            hidden = steps >= self.lengths[:, None]
            if window is not None:
                hidden |= steps < self.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask = mask.masked_fill_(hidden, -float("inf")).repeat_interleave(heads, dim=0).unsqueeze(1)
            self.masks[window, heads] = mask
        return mask

    def write_places(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of (slot x head, position) for each row and head, int64 [rows x heads] each."""
        import torch

        places = self.places.get(heads)
        if places is None:
            rows = torch.arange(len(self.lengths) * heads, device=self.lengths.device)
            places = (rows, (self.lengths - 1 - self.shared).repeat_interleave(heads))
            self.places[heads] = places
        return places


@dataclass
class PrefillSegment:
    """A stretch of one row's prompt: token places [start, end) of the step, positions from `offset` on."""

    row: Row
    start: int
    end: int
    offset: int
    masks: dict[tuple[int | None, int, int], torch.Tensor] = field(default_factory=dict)

    def mask(
        self, begin: int, end: int, window: int | None, repeats: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Causal mask of queries [begin, end) of the segment, repeated for grouped heads.

        Shape [1, repeats x queries, keys] with keys = offset + end.
        """
        import torch

        mask = self.masks.get((window, begin, repeats))
        if mask is None:
            keys = torch.arange(self.offset + end, device=like.device)
            queries = torch.arange(self.offset + begin, self.offset + end, device=like.device)[:, None]
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            mask = mask.masked_fill_(hidden, -float("inf")).repeat(repeats, 1).unsqueeze(0)
            self.masks[window, begin, repeats] = mask
        return mask


@dataclass
class PackedStep:
    """What one forward pass holds: decoding rows first, then stretches of prompts."""

    groups: list[DecodeGroup]
    segments: list[PrefillSegment]
    prefix: Row | None = None
    """The prefix that all rows of the step read in one place, if there is one."""
    windows: set[int | None] = field(default_factory=set)
    """Sliding windows that the model's layers asked for."""


# Of the context, not of the process: two threads may generate at once.
_current: ContextVar[PackedStep] = ContextVar("packed_step")


@contextmanager
def running(step: PackedStep) -> Iterator[None]:
    """Make `step` the one that the attention function serves."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use packed attention inside the block, its own before and after."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    configs = _attention_configs(model)
    earlier = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, earlier, strict=True):
            config._attn_implementation = name


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that the model's modules read; they often share one."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    return list(configs.values())


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' signature; query, key, value are [1, heads, tokens, dim].

    Returns [1, tokens, heads, dim]. Raises NotImplementedError for what packed attention does not cover.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    step = _current.get()
    step.windows.add(sliding_window)
    call = _Call(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        query=query,
        key=key,
        value=value,
        output=query.new_empty(query.shape[2], query.shape[1], value.shape[3]),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        prefix=step.prefix,
    )
    if step.groups:
        call.decode(step.groups)
    for segment in step.segments:
        call.prefill(segment)
    return call.output.unsqueeze(0), None


@dataclass(slots=True)
class _Call:
    """The attention of one layer in one step; query, key, value are [1, heads, tokens, dim]."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    """[tokens, heads, dim]."""
    scale: float
    window: int | None
    softcap: float | None
    prefix: Row | None

    def decode(self, groups: list[DecodeGroup]) -> None:
        """Write each group's new keys and values into its slots and attend each row to its own."""
        heads = self.key.shape[1]
        repeats, count = self.query.shape[1] // heads, groups[-1].end
        # Once for all groups, whose rows come first in the step: [rows x heads, ...] each.
        new_keys = _by_row(self.key, count).reshape(count * heads, -1)
        new_values = _by_row(self.value, count).reshape(count * heads, -1)
        queries = _by_row(self.query, count).reshape(count * heads, repeats, -1)
        output = self.output[:count].view(count * heads, repeats, -1)
        for group in groups:
            store = group.pool.layer(self.layer, self.key, self.value)
            taken, rows = slice(group.start * heads, group.end * heads), group.end - group.start
            places = group.write_places(heads)
            store.keys[places] = new_keys[taken]
            store.values[places] = new_values[taken]
            # Whole slots, not only their filled part: a slice would be copied before each product.
            keys, values = store.keys[: rows * heads], store.values[: rows * heads]
            mask = group.mask(self.window, heads, self.query.dtype)
            self._attend(queries[taken], keys, values, mask, output[taken])

    def prefill(self, segment: PrefillSegment) -> None:
        """Write a stretch of a prompt into its row's slot and attend its tokens to what is before them."""
        row, start, length = segment.row, segment.start, segment.end - segment.start
        assert row.pool is not None, "a row that prefills has a slot"
        store = row.pool.layer(self.layer, self.key, self.value)
        heads, first = store.heads, segment.offset - row.shared
        repeats = self.query.shape[1] // heads
        keys, values = store.of_slot(row.slot, first + length)
        keys[:, first:] = self.key[0, :, start : segment.end]
        values[:, first:] = self.value[0, :, start : segment.end]
        grouped = self.query[0].view(heads, repeats, self.query.shape[2], -1)
        for begin in range(0, length, QUERY_BLOCK):
            end = min(length, begin + QUERY_BLOCK)
            queries = grouped[:, :, start + begin : start + end].reshape(heads, repeats * (end - begin), -1)
            seen = first + end
            mask = segment.mask(begin, end, self.window, repeats, self.query)
            attended = self._attend(queries, keys[:, :seen], values[:, :seen], mask)
            block = attended.view(heads * repeats, end - begin, -1).transpose(0, 1)
            self.output[start + begin : start + end] = block

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """softmax(queries keys^T scale + mask) values, batched over the first dimension, rows x heads.

        Written to `out` if there is one. `mask` covers the shared prefix too, whose keys and values come before
        those given. Explicit products: on CPU they run through oneDNN and are two to four times as fast in bfloat16
        as the fused kernel, and equally fast in float32 (docs/performance.md).
        """
        import torch

        if self.prefix is None:
            if self.softcap is None:
                scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=self.scale)
            else:
                scores = self._capped(torch.bmm(queries, keys.transpose(1, 2))).add_(mask)
            return torch.bmm(scores.softmax(dim=-1), values, out=out)
        shared_keys, shared_values = self._shared()
        scale = self.scale
        if (
            queries.dtype is torch.float16 and self.softcap is None
        ):  # products over 65,504 would become infinite
            queries, scale = queries * scale, 1.0
        own = torch.bmm(queries, keys.transpose(1, 2))
        before = _over_rows(queries, shared_keys.transpose(1, 2))
        scores = torch.cat([before, own], dim=-1)
        scores = torch.add(mask, scores, alpha=scale) if self.softcap is None else self._capped(scores) + mask
        weights, length = scores.softmax(dim=-1), shared_keys.shape[1]
        result = torch.bmm(weights[..., length:], values, out=out)
        return result.add_(_over_rows(weights[..., :length], shared_values))

    def _capped(self, scores: torch.Tensor) -> torch.Tensor:
        assert self.softcap is not None
        return scores.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def _shared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the shared prefix, [heads, tokens, dim] each."""
        assert self.prefix is not None and self.prefix.pool is not None, "the prefix has a slot"
        return self.prefix.pool.layers[self.layer].of_slot(self.prefix.slot, self.prefix.cached)


def _over_rows(states: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Multiply each row's [repeats, n] by what all rows share: one product a head instead of one a row.

    `states` is [rows x heads, repeats, n], `shared` [heads, n, m]; returns [rows x heads, repeats, m].
    """
    import torch

    heads, repeats, size = shared.shape[0], states.shape[1], states.shape[2]
    rows = states.shape[0] // heads
    by_head = states.reshape(rows, heads, repeats, size)
    product = torch.bmm(by_head.transpose(0, 1).reshape(heads, rows * repeats, size), shared)
    return product.view(heads, rows, repeats, -1).transpose(0, 1).reshape(rows * heads, repeats, -1)


def _by_row(states: torch.Tensor, count: int) -> torch.Tensor:
    """[1, heads, tokens, dim] -> [rows, heads, dim] of the first `count` tokens, one a row."""
    return states[0, :, :count].transpose(0, 1)
