"""Fine-tune a base model on training rows: from settings to a complete model directory.

settings -> rows -> identity -> (reuse | resume | train: `processes/`) -> weights, card, manifest -> Hub
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core import interruption
from tasks.core.config import FineTunerConfig
from tasks.core.errors import ModelLoadError, RunKeyMismatchError, RunLockedError
from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained import registry
from tasks.core.records import ModelManifest
from tasks.core.runs.run_dir import RunDir
from tasks.core.training import checkpoints
from tasks.core.training.identity import IDENTITY_NAME, TrainingIdentity, claim, read_identity
from tasks.core.training.progress import TrainingProgress

if TYPE_CHECKING:
    from tasks.core.training.job import Job
    from tasks.core.training.processes.work import Trainers, TrainingWork
    from tasks.core.training.remote.trainings import RemoteTrainings

__all__ = ["TrainedModel", "TrainingProgress", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A complete model directory and its manifest. `reused` tells that nothing had to be trained."""

    model_dir: Path
    manifest: ModelManifest
    reused: bool = False


def train(
    config: FineTunerConfig,
    *,
    models_dir: Path,
    run_name: str | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    started_at: datetime | None = None,
    home: RemoteTrainings | None = None,
) -> TrainedModel:
    """Train as `config` says into `models_dir/<run_name>` and return the complete model.

    A finished run of the same settings and data is returned as it is; an unfinished one goes on from its newest
    whole checkpoint. Without `run_name`, `config.run_name` or, if that is unset, base and time (`started_at`, or
    now) name the run; an interrupted run of the same settings is then found and finished. With a `home` at a URL, of
    which `models_dir` is the mirror, checkpoints and model are brought from there and sent there. Raises ConfigError,
    DataError, ModelNotFoundError, ModelLoadError, RunKeyMismatchError, RunLockedError, OutOfMemoryError,
    TrainingError, StorageError.
    """
    from tasks.core.training.job import check_schedule
    from tasks.core.training.processes.choosing import choose_trainers, work_of

    check_schedule(config)
    if run_name is not None or config.run_name is not None:  # a bad name is told before the long work
        registry.model_dir(models_dir, run_name or config.full_run_name(""))
    trainers = choose_trainers(config)
    try:
        job, identity = _prepare(config)
        model_dir = _choose_dir(config, models_dir, run_name, identity, started_at or datetime.now(), home)
        interruption.keeps(lambda: _kept(model_dir))
        with _held(model_dir, home):
            if home is not None:
                home.bring(model_dir, resume=config.resume)
            trained = _finished(model_dir, identity, resume=config.resume)
            if trained is None:
                work = work_of(job, model_dir, config)
                manifest = _train(trainers, work, home, on_progress, resume=config.resume)
                trained = TrainedModel(model_dir, manifest)
            if home is not None:
                home.publish(model_dir)
    finally:
        trainers.dismiss()
    if config.push_to_hub:
        from tasks.core.training.hub import push

        push(model_dir, hf_user_id=config.hf_user_id)
    return trained


def _train(
    trainers: Trainers,
    work: TrainingWork,
    home: RemoteTrainings | None,
    on_progress: Callable[[TrainingProgress], None] | None,
    *,
    resume: bool,
) -> ModelManifest:
    """Train; checkpoints go to a URL from where they are written, which on a cluster is another machine."""
    if home is None:
        return trainers.train(work, on_progress)
    home.claim(work.model_dir, resume=resume)
    if trainers.sends_checkpoints:
        return trainers.train(replace(work, home=home), on_progress)
    with home.sending(work.model_dir):
        return trainers.train(work, on_progress)


@contextmanager
def _held(model_dir: Path, home: RemoteTrainings | None) -> Iterator[None]:
    """Hold a training against other processes and, at a URL, other machines. Raises RunLockedError."""
    with RunDir(model_dir).locked(), nullcontext() if home is None else home.held(model_dir):
        yield


def _kept(model_dir: Path) -> str:
    """What an interrupted training keeps."""
    if registry.why_incomplete(model_dir) is None:
        return f"the model {model_dir} is complete; {interruption.way_on()} goes on after it"
    checkpoint_dir = checkpoints.newest_whole(model_dir / checkpoints.CHECKPOINTS)
    if checkpoint_dir is None:
        return "the training has no checkpoint yet (fine_tuner.save_steps), the same command begins it again"
    step = checkpoints.step_of(checkpoint_dir)
    return f"{step:,} updates are kept; {interruption.way_on()} goes on from update {step + 1:,}"


def _prepare(config: FineTunerConfig) -> tuple[Job, TrainingIdentity]:
    """Read base, tokenizer and rows: enough to tell what this training is, before weights are loaded."""
    from tasks.core.models.context_length import context_length_of, possible_length
    from tasks.core.models.loading import ModelSpec, identify, load_tokenizer
    from tasks.core.training.job import Job
    from tasks.core.training.methods.catalogue import method_of
    from tasks.core.training.processes.choosing import device_of, precision_of
    from tasks.core.training.schedule import schedule_of

    device = device_of(config)
    spec = replace(
        ModelSpec.of_base(config),
        dtype=None,  # training chooses its own
        device=device if config.device != "auto" or device in ("cpu", "mps") else "auto",
        for_training=True,
    )
    base = identify(spec)
    precision = precision_of(config, base.dtype, device)
    possible = possible_length(context_length_of(spec), max_sequence_length=config.max_sequence_length)
    config = config.model_copy(update={"max_sequence_length": possible})
    data = method_of(config).read(config, load_tokenizer(spec))
    identity = TrainingIdentity.of(config, base, data, precision.compute)
    schedule = schedule_of(config, data.train.rows)
    spec = replace(spec, dtype=precision.weights)
    return Job(config, spec, base, data, schedule, precision, device), identity


def _choose_dir(
    config: FineTunerConfig,
    models_dir: Path,
    run_name: str | None,
    identity: TrainingIdentity,
    started_at: datetime,
    home: RemoteTrainings | None,
) -> Path:
    if run_name is None and config.run_name is None and config.resume:
        interrupted = _interrupted_run(config, models_dir, identity, home)
        if interrupted is not None:
            logger.info("%s was interrupted and has the same settings and data: finishing it", interrupted)
            return interrupted
    while True:
        time = started_at.astimezone().strftime("%Y%m%d-%H%M%S")
        model_dir = registry.model_dir(models_dir, run_name or name_of_training(config, time))
        if run_name is not None or config.run_name is not None or not model_dir.exists():
            return model_dir
        started_at += timedelta(seconds=1)  # another one began in the same second


def name_of_training(config: FineTunerConfig, time: str) -> str:
    """The configured name of a training, or one made of base model and time, with prefix and suffix."""
    if config.run_name is not None:
        return config.full_run_name("")
    made = f"{registry.slug(config.base_model_id)}-{time}"
    return registry.made_up_name(made, config.run_name_prefix, config.run_name_suffix)


def _interrupted_run(
    config: FineTunerConfig, models_dir: Path, identity: TrainingIdentity, home: RemoteTrainings | None
) -> Path | None:
    """The newest unnamed run that began with this identity, has a checkpoint and is neither done nor running."""
    made = f"{registry.slug(config.base_model_id)}-" + "[0-9]" * 8 + "-" + "[0-9]" * 6
    pattern = config.full_run_name(made)
    if home is not None:
        home.bring_identities()
    for model_dir in sorted(models_dir.glob(pattern), reverse=True):
        if registry.why_incomplete(model_dir) is None or read_identity(model_dir) != identity:
            continue
        try:
            with _held(model_dir, home):
                if home is not None:
                    home.bring(model_dir, resume=True)
                    if registry.why_incomplete(model_dir) is None:
                        continue
                if checkpoints.newest_whole(model_dir / checkpoints.CHECKPOINTS) is not None:
                    return model_dir
        except RunLockedError:
            continue
    return None


def _finished(model_dir: Path, identity: TrainingIdentity, *, resume: bool) -> TrainedModel | None:
    """The model, if this very training was finished here before; the directory belongs to it afterwards."""
    is_complete = registry.why_incomplete(model_dir) is None
    if is_complete and read_identity(model_dir) is None:
        raise RunKeyMismatchError(
            f"{model_dir} holds a model of unknown settings (it has no identity.json)",
            "set fine_tuner.run_name to another name, or move that model away",
        )
    if not is_complete and not resume:
        checkpoints.remove_all(model_dir / checkpoints.CHECKPOINTS)
        (model_dir / IDENTITY_NAME).unlink(missing_ok=True)
    claim(model_dir, identity)
    if not is_complete:
        return None
    manifest = registry.read_manifest(model_dir)
    if manifest.weights_sha256 not in (None, weights_sha256(model_dir)):
        raise ModelLoadError(
            f"{model_dir} was trained before, but its files have changed since: they are no longer that training's",
            "put them back from a copy; or delete the directory, or set another fine_tuner.run_name, to train anew",
        )
    logger.info("%s was trained before with the same settings and data; it is used as it is", model_dir)
    return TrainedModel(model_dir, manifest, reused=True)
