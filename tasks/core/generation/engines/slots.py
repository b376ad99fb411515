"""Keys and values of the rows in flight: slots in pools of equal width, written in place.

A pool holds, per layer, keys and values of shape [slots x heads, width, head_dim]; its rows lie densely in
the first slots, so that attention over the pool is one batched product over views. A row starts in the
narrowest pool that fits it and moves to a wider one when it outgrows it, so that short rows never pay for
long ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.core.generation.engines.allocation import Slab

if TYPE_CHECKING:
    import torch

    from tasks.core.generation.batching import Request
    from tasks.core.generation.engines.sampling import RowStream, SeenTokens

SMALLEST_WIDTH = 64
# Narrow steps waste little attention on empty positions, wide ones need fewer products a layer.
WIDTH_GROWTH = 1.3


@dataclass(eq=False, slots=True)
class Row:
    """One request in flight."""

    request: Request
    stream: RowStream | None
    started_seconds: float
    cached: int = 0
    """Tokens whose keys and values are there: those of the shared prefix and those in the slot."""
    shared: int = 0
    """Tokens of a prefix that all rows read in one place; the slot holds what comes after them."""
    new_tokens: list[int] = field(default_factory=list)
    seen: SeenTokens | None = None
    """Different tokens of prompt and answer, where a setting looks back at them."""
    pool: Pool | None = None
    slot: int = -1

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is in the slot, so that the row decodes."""
        return self.cached >= len(self.request.token_ids)

    @property
    def stored(self) -> int:
        """Tokens whose keys and values are in the slot."""
        return self.cached - self.shared

    @property
    def missing(self) -> int:
        """Prompt tokens that are not in the slot yet."""
        return len(self.request.token_ids) - self.cached

    def copy_from(self, other: Row) -> None:
        """Take over the keys and values of `other`, whose tokens begin this row's prompt."""
        assert self.pool is not None and other.pool is not None, "both rows have slots"
        other.pool.copy_slot(other.slot, self.pool, self.slot, other.stored)
        self.cached = other.cached


class LayerStore:
    """Keys and values of one layer of one pool; shapes [slots x heads, width, key or value dim]."""

    def __init__(self, slots: int, width: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make room for `slots` rows; key and value are [1, heads, tokens, dim]."""
        self.heads = key.shape[1]
        # Zeros: masked positions are multiplied by 0, which garbage such as NaN would survive.
        self._keys = Slab((slots * self.heads, width, key.shape[3]), key)
        self._values = Slab((slots * self.heads, width, value.shape[3]), value)

    @property
    def keys(self) -> torch.Tensor:
        """Keys of all slots."""
        return self._keys.tensor

    @property
    def values(self) -> torch.Tensor:
        """Values of all slots."""
        return self._values.tensor

    def resize(self, slots: int) -> None:
        """Make room for `slots` rows; those that both sizes have stay."""
        self._keys.resize(slots * self.heads)
        self._values.resize(slots * self.heads)

    def of_slot(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `length` positions of one slot: [heads, length, dim] each."""
        rows = slice(slot * self.heads, (slot + 1) * self.heads)
        return self.keys[rows, :length], self.values[rows, :length]


class Pool:
    """Slots of one width; `clears` as in SlotCache."""

    def __init__(self, width: int, *, clears: bool = False) -> None:
        self.width, self.clears = width, clears
        self.rows: list[Row | None] = []
        self.layers: dict[int, LayerStore] = {}
        self._slots = 0

    def __len__(self) -> int:
        return sum(row is not None for row in self.rows)

    def add(self, row: Row) -> None:
        """Give `row` a free slot: a hole if there is one, else a new slot at the end."""
        for slot, holder in enumerate(self.rows):
            if holder is None:
                self.rows[slot] = row
                break
        else:
            slot = len(self.rows)
            self.rows.append(row)
        row.pool, row.slot = self, slot
        if len(self.rows) > self._slots:
            self._resize(self._slots + max(1, int(self._slots * self._growth())))

    def remove(self, row: Row, *, clear: bool = False) -> None:
        """Free the row's slot, with zeros in it if `clear`. An empty pool gives its memory back."""
        self._free(row.slot, row.stored, clear=clear)
        row.pool, row.slot = None, -1

    def dense_rows(self) -> list[Row]:
        """All rows in slot order; the caller has closed the holes."""
        return [row for row in self.rows if row is not None]

    def _free(self, slot: int, length: int, *, clear: bool = False) -> None:
        if clear or self.clears:
            self._clear(slot, length)
        self.rows[slot] = None
        self._trim()
        if not self.rows:
            self.layers.clear()
            self._slots = 0
        elif len(self.rows) <= self._slots // 2:
            self._resize(len(self.rows))

    def _trim(self) -> None:
        while self.rows and self.rows[-1] is None:
            self.rows.pop()

    def close_holes(self) -> None:
        """Move rows from the end into holes, so that rows lie densely; copies one row a hole at most."""
        slot = 0
        while slot < len(self.rows):
            if self.rows[slot] is None:
                last = self.rows.pop()  # never None: `_free` leaves no hole at the end
                assert last is not None, "the last slot holds a row"
                self.copy_slot(last.slot, self, slot, last.stored)
                if self.clears:
                    self._clear(last.slot, last.stored)
                self.rows[slot], last.slot = last, slot
                self._trim()
            slot += 1

    def move_to(self, wider: Pool, row: Row) -> None:
        """Move `row` with its keys and values to `wider`."""
        source = row.slot
        wider.add(row)
        self.copy_slot(source, wider, row.slot, row.stored)
        self._free(source, row.stored)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
        """Return the store of layer `index`, made on first use from keys and values of [1, heads, tokens, dim]."""
        store = self.layers.get(index)
        if store is None:
            store = self.layers[index] = LayerStore(self._slots, self.width, key, value)
        return store

    def _growth(self) -> float:
        """Share by which the slots grow: on CPU, where untouched pages take no memory, fewer steps count more."""
        on_cpu = all(store.keys.device.type == "cpu" for store in self.layers.values())
        return 1.0 if on_cpu else 0.25

    def _resize(self, slots: int) -> None:
        """Make room for `slots` rows."""
        self._slots = slots
        for store in self.layers.values():
            store.resize(slots)

    def _clear(self, slot: int, length: int) -> None:
        """Write zeros over the first `length` positions of a slot: infinity there would outlast its masking."""
        import torch

        with torch.inference_mode():
            for store in self.layers.values():
                for states in store.of_slot(slot, length):
                    states.zero_()

    def copy_slot(self, source: int, target_pool: Pool, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` over those of `target` in `target_pool`."""
        import torch

        with torch.inference_mode():
            for index, store in self.layers.items():
                keys, values = store.of_slot(source, length)
                target_store = target_pool.layer(index, keys.unsqueeze(0), values.unsqueeze(0))
                target_keys, target_values = target_store.of_slot(target, length)
                target_keys.copy_(keys)
                target_values.copy_(values)


class SlotCache:
    """All pools, widths growing by `growth` from 64 (multiples of 16).

    `clears`: a slot is filled with zeros when its row leaves or moves. Needed where a row with a good answer may leave
    infinity behind, which float16 has from 65,520 on.
    """

    def __init__(self, *, max_width: int, growth: float = WIDTH_GROWTH, clears: bool = False) -> None:
        self.pools: list[Pool] = []
        width = SMALLEST_WIDTH
        while True:
            self.pools.append(Pool(min(width, max_width), clears=clears))
            if width >= max_width:
                break
            width = -(-int(width * growth) // 16) * 16

    def add(self, row: Row, tokens: int) -> None:
        """Give `row` a slot that holds `tokens`."""
        self._pool_for(tokens).add(row)

    def make_room(self, row: Row, tokens: int) -> None:
        """Move `row` to a wider pool when its own cannot hold `tokens`."""
        pool = row.pool
        assert pool is not None, "the row has a slot"
        if tokens > pool.width:
            pool.move_to(self._pool_for(tokens), row)

    def take_over(self, row: Row, tokens: int) -> None:
        """Move `row` from another cache into a slot here that holds `tokens`."""
        assert row.pool is not None, "the row has a slot"
        row.pool.move_to(self._pool_for(tokens), row)

    def remove(self, row: Row, *, clear: bool = False) -> None:
        """Free the row's slot; with `clear` nothing stays in it, as NaN would reach the slot's next row."""
        assert row.pool is not None, "the row has a slot"
        row.pool.remove(row, clear=clear)

    def active(self) -> Iterator[Pool]:
        """Pools with rows, rows dense, narrowest first."""
        for pool in self.pools:
            if pool.rows:
                pool.close_holes()
            if pool.rows:
                yield pool

    def _pool_for(self, tokens: int) -> Pool:
        for pool in self.pools:
            if tokens <= pool.width:
                return pool
        raise ValueError(f"no pool holds {tokens} tokens; the widest has {self.pools[-1].width}")
