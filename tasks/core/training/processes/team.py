"""What a process of a training has of the others: sums, agreement, and what only one of them does.

Whatever the processes exchange begins with an agreement, in which each says whether it can go on. One that cannot (its
memory ran out, its disk is full) says so in the agreement that the others come to next, so none waits in an exchange
that will never be. Inside the layers of a model that is shared out (`fsdp`) there is no such place: there the process
ends, and its group with it (`rank.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.core.errors import first_line
from tasks.core.memory.device_memory import is_out_of_memory
from tasks.core.training.processes.work import Strategy

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_GOES_ON, _OUT_OF_MEMORY, _FAILED = 0.0, 1.0, 2.0
_VALUES = 3  # that an agreement can carry


class OthersOutOfMemoryError(MemoryError):
    """Memory ran out in another process; all go back to the newest checkpoint and compute fewer rows at once."""


class OthersFailedError(Exception):
    """Another process has an error to tell; this one has nothing to add."""


@dataclass(frozen=True, slots=True)
class Team:
    """A process among those that train one model. Alone, every method is free and changes nothing."""

    rank: int = 0
    size: int = 1
    strategy: Strategy = "one"

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells of progress."""
        return self.rank == 0

    @property
    def is_shared_out(self) -> bool:
        """Whether each process holds a part of the model, so that all must compute at the same time."""
        return self.strategy == "fsdp"

    def totals(self, *values: float) -> tuple[float, ...]:
        """The sums of up to three numbers over all processes, added in the order of ranks: equal in each of them.

        Raises OthersOutOfMemoryError or OthersFailedError where another process cannot go on.
        """
        if self.size == 1:
            return values
        told = self._exchange(_GOES_ON, values)
        flags = [line[0] for line in told]
        if _FAILED in flags:
            raise OthersFailedError
        if _OUT_OF_MEMORY in flags:
            rank = flags.index(_OUT_OF_MEMORY)
            raise OthersOutOfMemoryError(f"memory ran out in process {rank} of {self.size}")
        return tuple(sum(line[1 + at] for line in told) for at in range(len(values)))

    def agree(self) -> None:
        """Wait for the others; raises as `totals` does."""
        self.totals()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others of an error that ends the block here, where they come to an agreement next."""
        try:
            yield
        except (OthersOutOfMemoryError, OthersFailedError):
            raise
        except Exception as error:
            if self.size > 1 and not self.is_shared_out:
                with suppress(Exception):  # they may be gone already
                    self._exchange(_OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED, ())
                logger.debug("told the other processes: %s", first_line(error))
            raise

    def of_leader(self, value: Value) -> Value:
        """What the first process has here, in all of them; it is pickled."""
        if self.size == 1:
            return value
        from torch import distributed

        self.agree()
        held: list[Any] = [value]
        distributed.broadcast_object_list(held, src=0)
        given: Value = held[0]
        return given

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Put the sum over all processes into each tensor, in place. Comes after an agreement."""
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor)

    def _exchange(self, flag: float, values: tuple[float, ...]) -> list[list[float]]:
        import torch
        from torch import distributed

        line = torch.tensor([flag, *values, *[0.0] * (_VALUES - len(values))], dtype=torch.float64)
        lines = [torch.empty_like(line) for _ in range(self.size)]
        distributed.all_gather(lines, line)  # on the processor: gloo, whatever the model computes on
        return [received.tolist() for received in lines]


ALONE = Team()
