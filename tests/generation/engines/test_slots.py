"""Slots grow, shrink and move without losing what rows have stored in them."""

from __future__ import annotations

import sys

import pytest
import torch

from tasks.core.generation.batching import Request
from tasks.core.generation.engines.allocation import Slab
from tasks.core.generation.engines.slots import Row, SlotCache
from tests.making.warm.python import run_python

MOVED_OR_COPIED = pytest.mark.parametrize(
    "moved", [True, False], ids=["pages moved", "copied"], indirect=True
)


@pytest.fixture
def moved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not sys.platform.startswith("linux"):
        pytest.skip("only Linux moves pages")
    if not request.param:  # as on other systems
        monkeypatch.setattr(Slab, "_move", lambda self, count: False)
    return bool(request.param)


@MOVED_OR_COPIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slab_keeps_what_both_sizes_have_and_is_zero_beyond(moved: bool, dtype: torch.dtype) -> None:
    slab = Slab((3, 5, 7), torch.empty(0, dtype=dtype))
    assert slab.tensor.dtype == dtype and not slab.tensor.any()
    numbers = torch.arange(3 * 35).view(3, 5, 7).to(dtype)
    slab.tensor.copy_(numbers)
    slab.resize(9000)
    assert torch.equal(slab.tensor[:3], numbers)
    assert slab.tensor.shape == (9000, 5, 7) and not slab.tensor[3:].any()
    slab.resize(2)
    assert torch.equal(slab.tensor, numbers[:2])
    slab.resize(4)
    assert torch.equal(slab.tensor[:2], numbers[:2])


@MOVED_OR_COPIED
def test_a_slab_grows_from_nothing_and_again_after_it_was_emptied(moved: bool) -> None:
    slab = Slab((0, 5), torch.empty(0))
    for count in (2, 0, 3):
        slab.resize(count)
        assert torch.equal(slab.tensor, torch.zeros(count, 5))
        slab.tensor.fill_(7)


MEMORY = """
import torch
from pathlib import Path
from tasks.core.generation.engines.allocation import Slab

def mib():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if "VmRSS" in line) // 1024

slab = Slab((1, 1 << 20), torch.empty(0))
before = mib()
slab.resize(64)
reserved = mib()
slab.tensor.fill_(1)
full = mib()
slab.resize(4)
print(reserved - before, full - before, mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_slab_takes_memory_when_written_and_gives_back_what_is_cut_off() -> None:
    done = run_python(["-c", MEMORY], check=True)
    reserved, full, cut = (int(figure) for figure in done.stdout.split())
    assert reserved < 16
    assert 250 < full < 275  # 64 x 4 MiB
    assert cut < 32


LIMITED = """
import resource, torch
from tasks.core.generation.engines.allocation import Slab
from tasks.core.memory.device_memory import is_out_of_memory

slab = Slab((1, 1 << 20), torch.empty(0))
slab.tensor.fill_(7)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), -1))
try:
    slab.resize(1024)
except OSError as exc:
    print(is_out_of_memory(exc), bool((slab.tensor == 7).all()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
def test_a_slab_that_may_not_grow_fails_as_out_of_memory_and_stays_as_it_was() -> None:
    done = run_python(["-c", LIMITED], check=True)
    assert done.stdout.split() == ["True", "True"]


@MOVED_OR_COPIED
@torch.inference_mode()
def test_rows_keep_their_keys_and_values_while_slots_come_go_and_widen(moved: bool) -> None:
    layers, heads, dim = 2, 3, 4
    cache = SlotCache(max_width=300)
    like = torch.empty(1, heads, 1, dim)
    rows: list[Row] = []

    def stored(number: int, layer: int) -> torch.Tensor:
        return torch.full((heads, rows[number].stored, dim), 100.0 * number + layer)

    def fill(row: Row, number: int) -> None:
        assert row.pool is not None
        for layer in range(layers):
            keys, values = row.pool.layer(layer, like, like).of_slot(row.slot, row.stored)
            keys.copy_(stored(number, layer))
            values.copy_(-stored(number, layer))

    def check(numbers: set[int]) -> None:
        assert {pool.width for pool in cache.pools if pool.rows} == {
            pool.width for pool in cache.active()
        }  # closes holes on the way
        for number in numbers:
            row = rows[number]
            assert row.pool is not None
            for layer in range(layers):
                keys, values = row.pool.layers[layer].of_slot(row.slot, row.stored)
                assert torch.equal(keys, stored(number, layer)), (number, layer)
                assert torch.equal(values, -stored(number, layer)), (number, layer)

    for number in range(20):  # slots of a pool double five times
        rows.append(Row(Request(number, str(number), (1,) * 300, 1), None, 0.0, cached=20 + number))
        cache.add(rows[number], rows[number].stored)
        fill(rows[number], number)
    check(set(range(20)))
    for number in (3, 17, 5, 0):  # those become too long for their pool
        cache.make_room(rows[number], 150)
        rows[number].cached = 140
        fill(rows[number], number)
    check(set(range(20)))
    for number in range(1, 19):
        if number not in (3, 17, 5):
            cache.remove(rows[number])
    check({0, 3, 5, 17, 19})
    for number in (0, 3, 5, 17, 19):
        cache.remove(rows[number])
    assert all(not pool.layers for pool in cache.pools)


def test_on_other_systems_a_slab_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    slab = Slab((2, 3), torch.empty(0))
    before = slab.tensor.fill_(4)
    slab.resize(5)
    assert before.data_ptr() != slab.tensor.data_ptr()
    assert torch.equal(slab.tensor, torch.tensor([[4.0] * 3] * 2 + [[0.0] * 3] * 3))
