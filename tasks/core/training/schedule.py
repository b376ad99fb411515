"""How many updates a training has, and the course of its learning rate over them.

From the warm-up's end on the rates are transformers' own. Its warm-up begins at 0, so that the first update would
change nothing, and it may be longer than the training; here update k of w has the share k / w of the peak rate,
and w is at most half of the updates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.config import FineTunerConfig
from tasks.core.errors import TrainingError

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR

    from tasks.core.training.methods.rows import TokenizedRows

logger = logging.getLogger(__name__)

FEW_UPDATES = 50
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a training will do. `sequences` are rows, or what the method makes of them; `in_update` counts those."""

    rows: int
    sequences: int
    learnt_tokens: int
    in_update: int
    epochs: float
    updates: int
    warmup_updates: int

    @property
    def described(self) -> str:
        """`39 (8 rows each, 3 epochs; warm-up in the first 5)`."""
        counted = "rows" if self.sequences == self.rows else f"of {self.sequences:,} sequences"
        warmup = f"; warm-up in the first {self.warmup_updates}" if self.warmup_updates else ""
        return f"{self.updates:,} ({self.in_update} {counted} each, {self.epochs:g} epochs{warmup})"

    @property
    def warning(self) -> str | None:
        """What to change where there are too few updates to learn much from."""
        if self.updates >= FEW_UPDATES:
            return None
        in_update = f", lower device_train_batch_size * grad_accumulation (now {self.in_update})"
        return (
            f"{self.updates} update{'s' * (self.updates != 1)} only; with fewer than about {FEW_UPDATES} a model "
            f"learns little: raise epochs (now {self.epochs:g}){in_update * (self.in_update > 1)}, or add rows"
        )


def schedule_of(config: FineTunerConfig, rows: TokenizedRows) -> Schedule:
    """The updates of a training on these rows. Raises TrainingError when no token of them is learnt."""
    from tasks.core.training.methods.catalogue import method_of

    learnt = rows.target_count
    if learnt == 0:
        raise TrainingError(
            f"none of the {rows.token_count:,} tokens of {len(rows)} rows is learnt: there is no answer in them",
            "check ground_truth_column, question_part and answer_part, or set train_on_responses_only = false",
        )
    grouped = method_of(config).sequences(rows, config)
    sequences = len(rows if grouped is None else grouped)
    in_update = config.device_train_batch_size * config.grad_accumulation
    updates = math.ceil(config.epochs * math.ceil(sequences / in_update))
    return Schedule(
        rows=len(rows),
        sequences=sequences,
        learnt_tokens=learnt,
        in_update=in_update,
        epochs=config.epochs,
        updates=updates,
        warmup_updates=warmup_updates(config, updates),
    )


def warmup_updates(config: FineTunerConfig, updates: int) -> int:
    """Updates until the peak rate: `warmup_ratio` of all, or `warmup_steps`, at most half of all."""
    if config.lr_scheduler_type in _WITHOUT_WARMUP:
        return 0
    if config.warmup_ratio is not None:
        return math.ceil(updates * config.warmup_ratio)
    return min(config.warmup_steps, updates // 2)


def from_above_zero(scheduler: LambdaLR, warmup: int) -> None:
    """Make update k of the `warmup` updates have k / warmup of the peak rate; transformers gives it k - 1."""
    if not warmup:
        return
    scheduler.lr_lambdas = [_warmed(share, warmup) for share in scheduler.lr_lambdas]
    rates = [peak * share(0) for peak, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _warmed(share: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """A plain function, so that a checkpoint of the scheduler holds its count of updates alone."""

    def warmed(update: int) -> float:
        return (update + 1) / warmup if update < warmup else share(update)

    return warmed
