"""transformers' Trainer with the loss of the answers, an order of rows that can be resumed, and sealed checkpoints.

Importing this module loads torch and transformers; import it inside functions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.core.errors import TrainingError
from tasks.core.interruption import raise_if_interrupted
from tasks.core.training import checkpoints
from tasks.core.training.job import BatchPlan
from tasks.core.training.methods.base import Batch, Batches, BatchLoss
from tasks.core.training.methods.batches import LengthGroupedOrder
from tasks.core.training.processes.gradients import add_up_gradients
from tasks.core.training.processes.sharding import ModelShards, is_in_parts, load_whole
from tasks.core.training.processes.sharing import SharedOrder
from tasks.core.training.processes.team import Team
from tasks.core.training.progress import TrainingMeter
from tasks.core.training.schedule import from_above_zero
from tasks.core.training.validation import best_validation, is_exhausted
from tasks.core.training.weights import checksums, save_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Indices(torch.utils.data.Dataset[int]):
    """Hands the sampler's indices to the collator, which reads the rows."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class AnswerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trains on `train` and measures the loss of `validation`; both are means per item of the method's batches.

    Of a `team` it is one process: transformers sees this one only, and what all of them share is done here.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        *,
        train: Batches,
        validation: Batches | None,
        loss: BatchLoss,
        meter: TrainingMeter,
        keep_checkpoints: int,
        plan: BatchPlan,
        team: Team,
        shards: ModelShards | None = None,
    ) -> None:
        self.control: TrainerControl
        self.step_loss = 0.0
        self.plan, self.team, self._shards = plan, team, shards
        self.seconds_before = 0.0
        self._started = time.monotonic()
        self._train, self._validation, self._meter = train, validation, meter
        self._keep_checkpoints = keep_checkpoints
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=Indices(len(train.lengths)),
            eval_dataset=None if validation is None else Indices(len(validation.lengths)),
        )
        # The loss below is divided by the items of the whole optimizer step, however it is cut in pieces.
        self.model_accepts_loss_kwargs = True
        self._loss = loss

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resumed checkpoint included."""
        return self.seconds_before + time.monotonic() - self._started

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The pieces of each update that this process computes."""
        order = LengthGroupedOrder(self._train.lengths, self.plan.rows_in_update, self.args.seed)
        batches = SharedOrder(order, self.plan, self.team.rank)
        loader: DataLoader[Any] = self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_sampler=batches,
                collate_fn=self._collate,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )
        return loader

    def _collate(self, indices: Sequence[int], batches: Batches | None = None) -> Batch:
        """A batch of these sequences; of none, one that counts nothing."""
        batches = batches or self._train
        if indices:
            return batches.collator(indices)
        if not self.team.is_shared_out:
            return {"item_count": 0, "token_count": 0}
        # The layers' parts go around at each pass, so all must take part in it.
        shortest = min(range(len(batches.lengths)), key=batches.lengths.__getitem__)
        return {**batches.collator([shortest]), "item_count": 0, "token_count": 0}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The course of the learning rate as in transformers, but with a warm-up whose first rate is above 0."""
        if self.lr_scheduler is None:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            from_above_zero(scheduler, self.args.get_warmup_steps(num_training_steps))
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The pieces of the next optimizer step and how many items it has, those of other processes included."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items, tokens = self.team.totals(
            sum(batch["item_count"] for batch in batches), sum(batch["token_count"] for batch in batches)
        )
        self.state.num_input_tokens_seen += int(tokens)  # saved with each checkpoint
        self._meter.add_tokens(int(tokens))
        self._piece = 0
        return batches, torch.tensor(int(items), device=device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss per item; in training, this piece's share of the optimizer step's mean."""
        loss = self._loss(model, inputs)
        if not inputs["item_count"]:
            return loss * 0.0
        return loss / (inputs["item_count"] if num_items_in_batch is None else num_items_in_batch)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One forward and backward pass; after the last one of an update, gradients and loss are those of all."""
        if self.team.size > 1 and self._piece == 0:
            self._seed_update()
        self._piece += 1
        is_last = bool(self.accelerator.sync_gradients)
        loss: torch.Tensor
        if "input_ids" in inputs or inputs["item_count"]:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = torch.zeros((), device=self.args.device)
        self.step_loss += float(loss)
        if self.team.size > 1 and is_last:
            (total,) = self.team.totals(self.step_loss)
            if self._shards is None:
                add_up_gradients(self.model, self.team)
            loss = loss + (total - self.step_loss)
            self.step_loss = total
        return loss

    def _seed_update(self) -> None:
        """Let each process draw its own dropout, from the update's number: after a resume as without one."""
        entropy = (self.args.seed, self.state.global_step, self.team.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """The length of all gradients, which are shortened to the longest that is allowed."""
        if self._shards is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return self._shards.clip_gradients(self.args.max_grad_norm)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per item of the validation rows, whatever the batch size. Uses no random numbers."""
        assert self._validation is not None
        batches, model = self._validation, self.model_wrapped
        was_training = model.training
        model.eval()
        loss, items = 0.0, 0.0
        with torch.no_grad():
            for indices in self._own_validation(batches):
                inputs = self._prepare_inputs(self._collate(indices, batches))
                loss += float(self.compute_loss(model, inputs, num_items_in_batch=1))
                items += inputs["item_count"]
        model.train(was_training)
        loss, items = self.team.totals(loss, items)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss is {loss / items} after {self.state.global_step} updates",
                'lower fine_tuner.learning_rate; if dtype is "float16", take "bfloat16" or "float32"',
            )
        metrics = {f"{metric_key_prefix}_loss": loss / items}
        self._meter.note_validation(metrics[f"{metric_key_prefix}_loss"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _own_validation(self, batches: Batches) -> list[list[int]]:
        """Every n-th batch of the validation rows; empty ones at the end where all must compute as many."""
        everyone = _by_length(batches.lengths, self.args.eval_batch_size)
        own = everyone[self.team.rank :: self.team.size]
        missing = -(-len(everyone) // self.team.size) - len(own)
        return own + [[]] * (missing if self.team.is_shared_out else 0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write only the weights that learn (or all of them) and what is needed to load them."""
        if self._shards is None:  # else all have written their parts
            save_weights(self.model, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint, seal it, and only then remove the oldest, but never the best."""
        checkpoints_dir = Path(self.args.output_dir)
        checkpoint_dir = checkpoints.at_step(checkpoints_dir, self.state.global_step)
        self._check_equal()
        if self._shards is not None:
            if self.team.leads:
                checkpoints.unseal(checkpoint_dir)
                checkpoint_dir.mkdir(parents=True, exist_ok=True)
            self.team.agree()
            self._shards.save(checkpoint_dir, self.optimizer)
        if self.team.leads:
            with checkpoints.storing(checkpoint_dir):
                checkpoints.unseal(checkpoint_dir)
                super()._save_checkpoint(model, trial)
                checkpoints.seal(checkpoint_dir, self.seconds)
            best = best_validation(self.state.log_history)
            checkpoints.rotate(checkpoints_dir, self._keep_checkpoints, None if best is None else best.step)
        self.team.agree()

    def _check_equal(self) -> None:
        """Raise TrainingError where processes that each hold the model have come to hold different ones."""
        if self.team.size == 1 or self._shards is not None:
            return
        own = sum(checksums(self.model).values()) % 2**40
        (total,) = self.team.totals(float(own))
        differing = self.team.totals(float(total != own * self.team.size))[0]
        if differing:
            raise TrainingError(
                f"after update {self.state.global_step} the processes hold different weights",
                "run the same command again: it goes on from the newest checkpoint; if it happens again, set "
                "processes = 1 and report it",
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:  # the optimizer is saved by all together
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint_dir = Path(resume_from_checkpoint)
        if self._shards is not None:
            self._shards.load_model(checkpoint_dir)
        elif is_in_parts(checkpoint_dir):
            load_whole(self.model, None, checkpoint_dir)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        checkpoint_dir = None if checkpoint is None else Path(checkpoint)
        if checkpoint_dir is None or (self._shards is None and not is_in_parts(checkpoint_dir)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self.optimizer.optimizer  # accelerate's wrapper is none of torch's
        if self._shards is not None:
            self._shards.load_optimizer(checkpoint_dir, optimizer)
        else:
            load_whole(self.model, optimizer, checkpoint_dir)
        self.lr_scheduler.load_state_dict(torch.load(checkpoint_dir / "scheduler.pt", weights_only=True))


class StepEnd(TrainerCallback):  # type: ignore[misc]
    """After each optimizer step: refuse a loss that is no number, report, and say when validation is due.

    Validation runs at the last step of an epoch and where a checkpoint is written, always before that
    checkpoint, so that resuming from it repeats or omits nothing. A best validation loss so far is always followed
    by a checkpoint. After `patience` validations without one, training ends.
    """

    def __init__(self, meter: TrainingMeter, patience: int | None) -> None:
        self.trainer: AnswerTrainer | None = None
        self._meter = meter
        self._patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and measure the validation loss of the untrained model."""
        self._meter.start(state.global_step)
        if self.trainer is not None and self.trainer.eval_dataset is not None and state.global_step == 0:
            self.trainer.evaluate()
            self._meter.start(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """See the class."""
        raise_if_interrupted()
        trainer = self.trainer
        assert trainer is not None
        loss, trainer.step_loss = trainer.step_loss, 0.0
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} at step {state.global_step} "
                f"(learning rate {trainer._get_learning_rate():.2g})",
                'lower fine_tuner.learning_rate or raise warmup_steps; if dtype is "float16", take "bfloat16"',
            )
        steps_in_epoch = max(1, math.ceil(len(trainer._train.lengths) / trainer.plan.rows_in_update))
        is_epoch_end = state.global_step % steps_in_epoch == 0
        if trainer.eval_dataset is not None and (is_epoch_end or state.global_step % state.save_steps == 0):
            control.should_evaluate = True
        self._meter.step_done(
            state.global_step,
            state.max_steps,
            epoch=float(state.epoch or 0.0),
            loss=loss,
            learning_rate=trainer._get_learning_rate(),
        )
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last loss belongs into the curve, whatever log_steps says
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """See the class."""
        best = best_validation(state.log_history)
        if best is None:  # the untrained model was measured
            return control
        if best.step == state.global_step:
            control.should_save = True
        elif is_exhausted(state.log_history, self._patience):
            logger.info(
                "no lower validation loss in %d validations since update %d: training ends after update %d",
                *(self._patience, best.step, state.global_step),
            )
            control.should_save = control.should_training_stop = True
        return control


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    ordered = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
