"""Work handed to another process: which part of a run, with what, and where that process sits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.config import Config, with_overrides
from tasks.core.generation.runners.seats import VISIBLE_DEVICES, share_cores
from tasks.core.memory.budget import BudgetStore
from tasks.core.runs.shards import Shard

if TYPE_CHECKING:
    from tasks.inferencer import Inferencer, PreparedRows


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a process works: on which GPU (None: on the cores), shared by how many processes."""

    gpu: str | None = None
    processes: int = 1

    def take(self) -> None:
        """Keep this process to its GPU or its share of the cores; call it before the model is loaded."""
        if self.gpu is not None:
            os.environ[VISIBLE_DEVICES] = self.gpu
        else:
            share_cores(self.processes)


ALONE = Seat()


@dataclass(frozen=True, slots=True)
class PartWork:
    """What a process needs to answer one shard, or with `shard` None a whole run; it can be pickled."""

    inferencer_class: type[Inferencer]
    config: Config
    model_id: str
    run_name: str
    budget_store: BudgetStore
    shard: Shard | None = None
    seat: Seat = ALONE

    def take_over(self) -> Inferencer:
        """Take the seat and make the inferencer that does the work here."""
        self.seat.take()
        # Whichever GPU the settings name, this process sees one only.
        own = {} if self.seat.gpu is None else {"inferencer.device": "cuda"}
        inferencer = self.inferencer_class(
            with_overrides(self.config, own),
            model=self.model_id,
            run_name=self.run_name,
            budget_store=self.budget_store,
        )
        inferencer.processes = self.seat.processes
        return inferencer

    def answer(self) -> None:
        """Answer the shard in this process, or in a child of it when isolation = "process"."""
        assert self.shard is not None
        inferencer = self.take_over()
        inferencer.answer_shard(inferencer.process_dataset(inferencer.load_dataset()), self.shard)


def hand_over(
    inferencer: Inferencer, prepared: PreparedRows, shard: Shard | None = None, seat: Seat = ALONE
) -> PartWork:
    """Write down an inferencer's work for another process."""
    # The run's full name is given, so prefix and suffix are in it already.
    own = {"inferencer.run_name_prefix": "", "inferencer.run_name_suffix": ""}
    return PartWork(
        type(inferencer),
        with_overrides(inferencer.config, own),
        inferencer.portable_model_id,
        prepared.run_name,
        inferencer.budget_store,
        shard,
        seat,
    )
