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

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.core.errors import TrainingError
from tasks.core.interruption import raise_if_interrupted
from tasks.core.training import checkpoints
from tasks.core.training.methods.base import Batch, Batches, BatchLoss
from tasks.core.training.methods.batches import LengthGroupedOrder
from tasks.core.training.progress import TrainingMeter
from tasks.core.training.schedule import from_above_zero
from tasks.core.training.validation import best_validation, is_exhausted
from tasks.core.training.weights import save_weights

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
    """Trains on `train` and measures the loss of `validation`; both are means per item of the method's batches."""

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
    ) -> None:
        self.control: TrainerControl
        self.step_loss = 0.0
        self.seconds_before = 0.0
        self._started = time.monotonic()
        self._train, self._validation, self._meter = train, validation, meter
        self._keep_checkpoints = keep_checkpoints
        super().__init__(
            model=model,
            args=args,
            data_collator=train.collator,
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

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
        rows_in_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedOrder(self._train.lengths, rows_in_step, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The course of the learning rate as in transformers, but with a warm-up whose first rate is above 0."""
        if self.lr_scheduler is None:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            from_above_zero(scheduler, self.args.get_warmup_steps(num_training_steps))
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The pieces of the next optimizer step and how many items they have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, torch.tensor(sum(batch["item_count"] for batch in batches), device=device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss per item; in training, this piece's share of the optimizer step's mean."""
        loss = self._loss(model, inputs)
        return loss / (inputs["item_count"] if num_items_in_batch is None else num_items_in_batch)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One forward and backward pass; adds up the loss of the optimizer step and its tokens."""
        tokens = int(inputs["token_count"])
        self.state.num_input_tokens_seen += tokens  # saved with each checkpoint
        self._meter.add_tokens(tokens)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss += float(loss)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per item of the validation rows, whatever the batch size. Uses no random numbers."""
        assert self._validation is not None
        batches, model = self._validation, self.model_wrapped
        was_training = model.training
        model.eval()
        loss, items = 0.0, 0
        with torch.no_grad():
            for indices in _by_length(batches.lengths, self.args.eval_batch_size):
                inputs = self._prepare_inputs(batches.collator(indices))
                loss += float(self.compute_loss(model, inputs, num_items_in_batch=1))
                items += inputs["item_count"]
        model.train(was_training)
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write only the weights that learn (or all of them) and what is needed to load them."""
        save_weights(self.model, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint, seal it, and only then remove the oldest, but never the best."""
        checkpoints_dir = Path(self.args.output_dir)
        checkpoint_dir = checkpoints_dir / f"checkpoint-{self.state.global_step}"
        with checkpoints.storing(checkpoint_dir):
            checkpoints.unseal(checkpoint_dir)
            super()._save_checkpoint(model, trial)
            checkpoints.seal(checkpoint_dir, self.seconds)
        best = best_validation(self.state.log_history)
        checkpoints.rotate(checkpoints_dir, self._keep_checkpoints, None if best is None else best.step)


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
        steps_in_epoch = max(1, math.ceil(len(trainer._train.lengths) / _rows_in_step(args)))
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


def _rows_in_step(args: TrainingArguments) -> int:
    return int(args.train_batch_size * args.gradient_accumulation_steps)


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    ordered = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
