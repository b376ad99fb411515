"""One try at a training: load, make trainable, train from the start or a checkpoint, check the result."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.data.preflight import check_disk_space
from tasks.core.errors import TrainingError
from tasks.core.memory.device_memory import is_out_of_memory
from tasks.core.models.loading import LoadedModel, load_model_and_tokenizer, load_tokenizer
from tasks.core.prompts.unlearnt_markers import warn_of_unseen_markers
from tasks.core.records import LossPoint
from tasks.core.training import checkpoints
from tasks.core.training.adapting import choose_attention, make_trainable, moves_base
from tasks.core.training.job import BatchPlan, Fitted, Job
from tasks.core.training.methods.base import Batches
from tasks.core.training.methods.rows import RowSet
from tasks.core.training.processes.team import ALONE, Team
from tasks.core.training.processes.work import Report
from tasks.core.training.progress import TrainingMeter
from tasks.core.training.validation import Validated, best_validation, is_exhausted, untrained_loss
from tasks.core.training.weights import checksums, save_weights, trained_weights_are_finite

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from tasks.core.training.processes.sharding import ModelShards
    from tasks.core.training.trainer import AnswerTrainer

logger = logging.getLogger(__name__)

INITIAL_ADAPTER = "initial-adapter"
# StepEnd says when to validate; Trainer only has to know that there are validation rows.
_NEVER_BY_STEPS = 10**9


def fit_once(
    job: Job, checkpoints_dir: Path, plan: BatchPlan, team: Team = ALONE, report: Report | None = None
) -> Fitted:
    """Train with the pieces of `plan`, from the newest whole checkpoint if there is one. Raises TrainingError."""
    from transformers import set_seed

    with _quiet_libraries():
        loaded = _load(job, team)
        set_seed(job.config.seed)  # the adapter's first weights are random
        train = _batches(job.data.train, job, pad_token_id := int(loaded.tokenizer.pad_token_id))
        model, shards, initial_adapter_dir = _trainable(job, checkpoints_dir, loaded, train, team)
        untrained = checksums(model)
        arguments = partial(_arguments, job, plan, checkpoints_dir, team)
        parts = _Parts(model, train, pad_token_id, TrainingMeter(report), plan, team, shards)
        trainer = _build_trainer(job, arguments, parts)
        _run(trainer, _resume_point(checkpoints_dir, team), job.config.early_stopping_patience)
        best = _take_best(trainer, checkpoints_dir)
        _check_weights(trainer.model, untrained, trainer.state.global_step, team)
        whole = trainer.model if shards is None else _whole(job, shards, train, team)
    return Fitted(
        model=whole,
        tokenizer=loaded.tokenizer,
        losses=loss_points(trainer.state.log_history),
        best=best,
        steps=trainer.state.global_step,
        planned_steps=trainer.state.max_steps,
        initial_adapter_dir=initial_adapter_dir,
        trained_tokens=int(trainer.state.num_input_tokens_seen),
        seconds=trainer.seconds,
        plan=plan,
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a trainer is made of, besides the job."""

    model: Any
    train: Batches
    pad_token_id: int
    meter: TrainingMeter
    plan: BatchPlan
    team: Team
    shards: ModelShards | None


def _load(job: Job, team: Team) -> LoadedModel:
    """The base; where each process will hold a part, it is read once, by the first, and not onto its device."""
    if not team.is_shared_out:
        return load_model_and_tokenizer(job.spec)
    if team.leads:
        return load_model_and_tokenizer(replace(job.spec, device="cpu"))
    no_model: Any = None
    return LoadedModel(no_model, load_tokenizer(job.spec), job.base, job.device)


def _trainable(
    job: Job, checkpoints_dir: Path, loaded: LoadedModel, train: Batches, team: Team
) -> tuple[Any, ModelShards | None, Path | None]:
    """The model that learns, or this process's part of it, and where its adapter's first weights are kept, if so."""
    from tasks.core.training.processes.sharding import ModelShards, share_start

    model: Any = None
    initial_adapter_dir = None
    if team.leads or not team.is_shared_out:
        model = _made_trainable(job, loaded.model, train)
        job.method.check_model(model, job.config)
    if team.leads:
        warn_of_unseen_markers(model, loaded.tokenizer)
        _check_disk(model, job, checkpoints_dir)
        initial_adapter_dir = _keep_initial_adapter(model, job, checkpoints_dir)
    if not team.is_shared_out:
        share_start(model, team)
        return model, None, initial_adapter_dir
    shards = ModelShards.of(model, team, job.device)
    return shards.model, shards, initial_adapter_dir


def _made_trainable(job: Job, model: Any, train: Batches) -> Any:
    if job.device == "cpu":  # a model that is shared out lies there only at first
        choose_attention(model, train.lengths)
    return make_trainable(model, job.config, job.base)


def _whole(job: Job, shards: ModelShards, train: Batches, team: Team) -> Any:
    """The trained model in one piece, in the first process; None in the others."""
    from transformers import set_seed

    whole = None
    if team.leads:  # read again, so that it does not lie in memory while training
        loaded = load_model_and_tokenizer(replace(job.spec, device="cpu"))
        set_seed(job.config.seed)
        whole = _made_trainable(job, loaded.model, train)
    team.agree()
    shards.gather(whole)
    return whole


def _resume_point(checkpoints_dir: Path, team: Team) -> Path | None:
    """The checkpoint to go on from, the same in all processes. Raises TrainingError where one does not reach it."""
    leaders = checkpoints.resume_point(checkpoints_dir) if team.leads else None
    name = team.of_leader(None if leaders is None else leaders.name)
    found = (
        None if name is None else checkpoints_dir / name
    )  # the directory may have another path on each machine
    if found is not None:
        (reached,) = team.totals(float(checkpoints.is_whole(found)))
        if reached < team.size:
            raise TrainingError(
                f"{found} is not there on every machine of this training",
                "put models_dir on a file system that all of them share",
            )
    return found


def _build_trainer(job: Job, arguments: Callable[[], TrainingArguments], parts: _Parts) -> AnswerTrainer:
    from transformers import PrinterCallback

    from tasks.core.training.trainer import AnswerTrainer, StepEnd

    config, validation = job.config, job.data.validation
    step_end = StepEnd(parts.meter, config.early_stopping_patience)
    try:
        trainer = AnswerTrainer(
            parts.model,
            arguments(),
            train=parts.train,
            validation=None if validation is None else _batches(validation, job, parts.pad_token_id),
            loss=job.method.loss(parts.model),
            meter=parts.meter,
            keep_checkpoints=config.save_total_limit,
            plan=parts.plan,
            team=parts.team,
            shards=parts.shards,
        )
        trainer.get_optimizer_cls_and_kwargs(trainer.args, parts.model)  # a missing package is told here
    except (ImportError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"transformers refuses these training settings: {error}",
            "change fine_tuner.optimizer, lr_scheduler_type or report_to, or install the package named above",
        ) from error
    trainer.remove_callback(PrinterCallback)
    step_end.trainer = trainer
    trainer.add_callback(step_end)
    return trainer


def _batches(rows: RowSet, job: Job, pad_token_id: int) -> Batches:
    sequences = job.method.sequences(rows.rows, job.config)
    if sequences is not None:
        logger.info("%d rows of %s stand in %d sequences", len(rows.rows), rows.data_id, len(sequences))
    return Batches(rows.rows, sequences, job.method.collator(rows.rows, sequences, pad_token_id))


def _arguments(job: Job, plan: BatchPlan, checkpoints_dir: Path, team: Team) -> TrainingArguments:
    from tasks.core.training.arguments import training_arguments

    config, precision = job.config, job.precision
    return training_arguments(
        job.device,
        output_dir=str(checkpoints_dir),
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=plan.validation_batch,
        gradient_accumulation_steps=plan.pieces,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        warmup_steps=job.schedule.warmup_updates,
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        neftune_noise_alpha=config.neftune_noise_alpha,
        lr_scheduler_type=config.lr_scheduler_type,
        seed=config.seed,
        bf16=precision.compute == "bfloat16",
        fp16=precision.compute == "float16",
        gradient_checkpointing=bool(config.use_gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=config.log_steps,
        logging_first_step=config.log_first_step,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        eval_strategy="no" if job.data.validation is None else "steps",
        eval_steps=_NEVER_BY_STEPS,
        report_to=config.report_to if team.leads else "none",
        run_name=checkpoints_dir.parent.name,
    )


def _run(trainer: AnswerTrainer, checkpoint_dir: Path | None, patience: int | None) -> None:
    """Train from the start or from a checkpoint; one taken at the end only gives its weights."""
    from transformers import TrainerState

    if checkpoint_dir is None:
        trainer.train()
        return
    trainer.seconds_before = checkpoints.seconds_of(checkpoint_dir)
    state = TrainerState.load_from_json(str(checkpoint_dir / "trainer_state.json"))
    logger.info("going on from %s (step %d of %d)", checkpoint_dir, state.global_step, state.max_steps)
    if state.global_step < state.max_steps and not is_exhausted(state.log_history, patience):
        trainer.train(resume_from_checkpoint=str(checkpoint_dir))
    else:
        trainer._load_from_checkpoint(str(checkpoint_dir))
        trainer.state = state


def _take_best(trainer: AnswerTrainer, checkpoints_dir: Path) -> Validated | None:
    """Put the weights with the lowest validation loss into the trainer's model; None without validation.

    Where each process holds the whole model, only that of the first is published.
    """
    log = trainer.state.log_history
    best = best_validation(log)
    if best is None:
        return None
    is_published = trainer.team.leads or trainer.team.is_shared_out
    if best.step != trainer.state.global_step and is_published:
        best_dir = checkpoints.at_step(checkpoints_dir, best.step)
        if not checkpoints.is_intact(best_dir):
            raise TrainingError(
                f"{best_dir} has the lowest validation loss ({best.loss:.4f}), but it is damaged or gone",
                "run the same command again: it goes on from a checkpoint before it and gives the same model",
            )
        trainer._load_from_checkpoint(str(best_dir))
        logger.info(
            "the model is that after update %d of %d, with the lowest validation loss (%.4f)",
            *(best.step, trainer.state.global_step, best.loss),
        )
    untrained = untrained_loss(log)
    if untrained is not None and best.loss >= untrained:
        logger.warning(
            "no validation loss is below that of the untrained model: %.4f at best, %.4f untrained; lower "
            "learning_rate, or see whether training and validation rows are of one kind",
            *(best.loss, untrained),
        )
    return best


def _keep_initial_adapter(model: Any, job: Job, checkpoints_dir: Path) -> Path | None:
    """Where the adapter's first weights lie, if the published adapter must be told apart from them."""
    if job.publishes_full_model or not moves_base(job.config):
        return None
    initial_dir = checkpoints_dir / INITIAL_ADAPTER
    with checkpoints.storing(initial_dir):
        save_weights(model, initial_dir)
    return initial_dir


def _check_disk(model: Any, job: Job, checkpoints_dir: Path) -> None:
    """Room for the checkpoints (weights and two optimizer states in float32) and the result, told in advance."""
    learnt = sum(part.numel() for part in model.parameters() if part.requires_grad)
    kept = job.config.save_total_limit + 1  # one more is there while the oldest is not yet removed
    kept += job.data.validation is not None  # the best one
    result = 4 * (model.num_parameters() if job.publishes_full_model else learnt)
    check_disk_space(checkpoints_dir, 12 * learnt * kept + result)


def _check_weights(model: Any, untrained: dict[str, int], updates: int, team: Team) -> None:
    changed, broken = team.totals(
        float(checksums(model) != untrained), float(not trained_weights_are_finite(model))
    )
    if not changed:
        raise TrainingError(
            f"no weight has changed in {updates} updates: nothing was learnt",
            'raise fine_tuner.learning_rate, or add rows; with dtype = "float16" take "bfloat16" or "float32"; '
            "then choose another run_name or set resume = false",
        )
    if broken:
        raise TrainingError(
            "some trained weights are no numbers (NaN) after the last step",
            "lower fine_tuner.learning_rate or raise warmup_steps; then choose another run_name or set resume = false",
        )


def loss_points(log_history: list[dict[str, Any]]) -> tuple[LossPoint, ...]:
    """The course of the losses from the trainer's log, one point a step."""
    points: dict[int, LossPoint] = {}
    for entry in log_history:
        if "loss" not in entry and "eval_loss" not in entry:
            continue
        step = int(entry["step"])
        point = points.get(step) or LossPoint(step=step, epoch=round(float(entry.get("epoch") or 0.0), 4))
        points[step] = point.model_copy(
            update={
                "loss": entry.get("loss", point.loss),
                "validation_loss": entry.get("eval_loss", point.validation_loss),
                "learning_rate": entry.get("learning_rate", point.learning_rate),
            }
        )
    return tuple(points[step] for step in sorted(points))


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Only errors of the model libraries are shown; our own log says what a person needs."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|bitsandbytes)\b")
            yield
    finally:
        transformers_logging.set_verbosity(before)
