"""What one training needs, how its steps are cut into pieces, and what it gives."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tasks.core.config import FineTunerConfig
from tasks.core.errors import ConfigError
from tasks.core.models.specs import ModelSpec
from tasks.core.records import LossPoint, MemoryEvent, ModelIdentity
from tasks.core.training.adapting import changes_base
from tasks.core.training.methods.base import TrainingMethod
from tasks.core.training.methods.catalogue import method_of
from tasks.core.training.methods.rows import TrainingData
from tasks.core.training.precision import Precision
from tasks.core.training.schedule import Schedule
from tasks.core.training.validation import Validated
from tasks.core.training.weights import merged

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Module and package of optimizers that torch, transformers and bitsandbytes do not bring.
_OPTIMIZER_PACKAGES = {
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao", "torchao")),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "grokadamw": ("grokadamw", "grokadamw"),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), ("schedulefree", "schedulefree")
    ),
    "stable_adamw": ("optimi", "torch-optimi"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """All that one training needs to know."""

    config: FineTunerConfig
    spec: ModelSpec
    base: ModelIdentity
    data: TrainingData
    schedule: Schedule
    precision: Precision
    device: str

    @property
    def method(self) -> TrainingMethod:
        """How the rows are learnt from."""
        return method_of(self.config)

    @property
    def publishes_full_model(self) -> bool:
        """Whether the result is a full model: all weights learnt, or the adapter's base exists nowhere else."""
        return self.config.full_finetuning or changes_base(self.config, self.base)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the rows of an optimizer step are cut into pieces: each of the processes computes its own in turn."""

    micro_batch: int
    accumulation: int
    validation_batch: int
    processes: int = 1

    @property
    def rows_in_update(self) -> int:
        """However many processes share them."""
        return self.micro_batch * self.accumulation

    @property
    def pieces(self) -> int:
        """Pieces of an update that each process computes."""
        return self.pieces_of(self.rows_in_update)

    @property
    def rows_at_once(self) -> int:
        """Rows of a piece, at most."""
        return -(-self.rows_in_update // (self.pieces * self.processes))

    def pieces_of(self, rows: int) -> int:
        """Pieces that each process computes of an update of so many rows; the last one of an epoch has fewer."""
        return -(-rows // (self.micro_batch * self.processes))

    def smaller(self) -> BatchPlan | None:
        """Fewer rows at once (half, or the next divisor below), the same rows in a step; None at one row."""
        plan = self._halved()
        while plan is not None and plan.rows_at_once == self.rows_at_once > 1:
            plan = plan._halved()
        return plan

    def _halved(self) -> BatchPlan | None:
        if self.micro_batch == 1 and self.validation_batch == 1:
            return None
        rows = self.rows_in_update
        micro = next(size for size in range(max(1, self.micro_batch // 2), 0, -1) if rows % size == 0)
        return BatchPlan(micro, rows // micro, max(1, self.validation_batch // 2), self.processes)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Trained weights and how they came about."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    losses: tuple[LossPoint, ...]
    best: Validated | None
    steps: int
    planned_steps: int
    trained_tokens: int
    seconds: float
    plan: BatchPlan
    initial_adapter_dir: Path | None = None
    memory_events: tuple[MemoryEvent, ...] = ()

    def publishable(self, job: Job) -> PreTrainedModel | PeftModel:
        """The model to write: the adapter, or a full model in the base's number format."""
        import torch

        if not job.publishes_full_model:
            return self.model
        full = self.model if job.config.full_finetuning else merged(cast("PeftModel", self.model))
        return full.to(getattr(torch, str(job.config.dtype or job.base.dtype)))


def check_schedule(config: FineTunerConfig) -> None:
    """Raise ConfigError for settings that need another one or a package; warn of those that will disappoint."""
    if config.lr_scheduler_type == "reduce_lr_on_plateau" and config.validation_data_id is None:
        raise ConfigError(
            'fine_tuner.lr_scheduler_type "reduce_lr_on_plateau" watches the validation loss, and there is no '
            "validation data",
            'set validation_data_id, or take "linear" or "cosine"',
        )
    needed = _OPTIMIZER_PACKAGES.get(config.optimizer)
    if needed is not None and find_spec(needed[0]) is None:
        raise ConfigError(
            f'fine_tuner.optimizer "{config.optimizer}" needs the package {needed[1]}, which is not installed',
            f'pip install {needed[1]}, or take "adamw_torch"',
        )
    if config.use_gradient_checkpointing == "unsloth":
        logger.warning('use_gradient_checkpointing = "unsloth" is taken as true')
