"""Which rows of an update each process of a group computes, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks.core.training.job import BatchPlan
from tasks.core.training.methods.batches import LengthGroupedOrder


class SharedOrder:
    """A batch sampler: the pieces of each update that are this process's own.

    The rows of an update are those of `order`, whoever computes them. They are cut into pieces as `plan` says, as many
    for each process, so that all come to the end of an update together; at the end of an epoch some pieces may be
    empty. Rows of an update stand longest first, so the pieces are dealt out forwards and backwards in turn, which
    gives each process as much to do.
    """

    def __init__(self, order: LengthGroupedOrder, plan: BatchPlan, rank: int) -> None:
        self._order, self._plan, self._rank = order, plan, rank

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Pieces in an epoch, the same number for every process."""
        whole, left = divmod(len(self._order), self._plan.rows_in_update)
        return whole * self._plan.pieces + self._plan.pieces_of(left)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self._order)
        for start in range(0, len(rows), self._plan.rows_in_update):
            yield from shares(rows[start : start + self._plan.rows_in_update], self._plan)[self._rank]


def shares(rows: Sequence[int], plan: BatchPlan) -> list[list[list[int]]]:
    """Deal the rows of an update out: for each process its pieces, equally many, each row in one of them."""
    count, size = plan.pieces_of(len(rows)), plan.processes
    # Alone, only the last piece is smaller; of several processes none shall have nothing while another has much.
    length = plan.micro_batch if size == 1 else -(-len(rows) // (count * size))
    pieces = [list(rows[at * length : (at + 1) * length]) for at in range(count * size)]
    dealt: list[list[list[int]]] = [[] for _ in range(size)]
    for turn in range(count):
        hand = pieces[turn * size : (turn + 1) * size]
        for rank, piece in enumerate(hand if turn % 2 == 0 else reversed(hand)):
            dealt[rank].append(piece)
    return dealt
