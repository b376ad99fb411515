"""What a training is: everything that shapes the trained weights, so that two of them are never mixed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tasks.core.config import FineTunerConfig
from tasks.core.config.changes import Changes, changes_of
from tasks.core.errors import RunKeyMismatchError
from tasks.core.files import write_atomically
from tasks.core.models.trained.registry import MANIFEST_NAME
from tasks.core.records import Record
from tasks.core.training import checkpoints

if TYPE_CHECKING:
    from tasks.core.records import ModelIdentity
    from tasks.core.training.methods.rows import TrainingData

logger = logging.getLogger(__name__)

IDENTITY_NAME = "identity.json"
_CHANGES = changes_of(FineTunerConfig)


class TrainingIdentity(Record):
    """`models/<run>/identity.json`: written before the first step."""

    settings: dict[str, Any]

    @classmethod
    def of(
        cls, config: FineTunerConfig, base: ModelIdentity, data: TrainingData, dtype: str
    ) -> TrainingIdentity:
        """Collect the identity; the batch counts as a whole, however it is cut to fit memory."""
        defaults = type(config)().model_dump(mode="json")
        settings = {
            name: value
            for name, value in config.model_dump(mode="json").items()
            if _enters(_CHANGES[name], config) and not (_CHANGES[name].came_later and value == defaults[name])
        }
        settings |= {
            "base weights": base.weights_sha256,
            "base adapter": base.adapter_sha256,
            "quantization": base.quantization,
            "dtype": dtype,
            "chat template": data.chat_template_sha256,
            "training rows": data.train.sha256,
            "validation rows": None if data.validation is None else data.validation.sha256,
            "rows in an optimizer step": config.device_train_batch_size * config.grad_accumulation,
        }
        # Where validation happens decides which checkpoint is the best.
        if data.validation is not None and config.save_steps != defaults["save_steps"]:
            settings["updates between validations"] = config.save_steps
        if data.train.earlier_count:
            settings["rows of earlier answers"] = data.train.earlier_count
        if data.template.writes_more:
            settings["answers end with"] = data.template.end
        return cls(settings=settings)

    def differences(self, other: TrainingIdentity) -> list[str]:
        """One line per setting that differs: `name: mine -> theirs`."""
        names = [*self.settings, *(name for name in other.settings if name not in self.settings)]
        pairs = ((name, self.settings.get(name), other.settings.get(name)) for name in names)
        return [
            f"{name}: {_shown(mine)} -> {_shown(theirs)}" for name, mine, theirs in pairs if mine != theirs
        ]


def _enters(changes: Changes, config: FineTunerConfig) -> bool:
    """Whether a setting shapes these weights, and nothing else in the identity stands for it."""
    unused = changes.kind == "adapter" and config.full_finetuning
    return changes.effect == "weights" and changes.within is None and not unused


def read_identity(model_dir: Path) -> TrainingIdentity | None:
    """The training a directory belongs to; None when it has none or the file is damaged."""
    try:
        return TrainingIdentity.model_validate_json((model_dir / IDENTITY_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def claim(model_dir: Path, identity: TrainingIdentity) -> None:
    """Bind a directory to a training. Raises RunKeyMismatchError when it belongs to another one.

    A training that ended before its first checkpoint left nothing to lose: its directory goes to the next one.
    """
    owner = read_identity(model_dir)
    if owner is None:
        foreign = next(model_dir.glob("*.safetensors"), None)
        if foreign is not None:
            raise RunKeyMismatchError(
                f"{model_dir} holds a model ({foreign.name}) that was not trained here",
                "set fine_tuner.run_name to another name, or move that model away",
            )
        _write(model_dir, identity)
        return
    differences = owner.differences(identity)
    if differences and not _holds_work(model_dir):
        logger.info("%s has neither a checkpoint nor weights; it is used for the new settings", model_dir)
        checkpoints.remove_all(model_dir / checkpoints.CHECKPOINTS)
        _write(model_dir, identity)
    elif differences:
        listed = "\n    ".join(differences)
        raise RunKeyMismatchError(
            f"{model_dir} belongs to a training with other settings (there -> now):\n    {listed}",
            "set fine_tuner.run_name or fine_tuner.run_name_suffix to keep both, go back to the old settings, "
            "or delete the directory",
        )


def _write(model_dir: Path, identity: TrainingIdentity) -> None:
    write_atomically(model_dir / IDENTITY_NAME, identity.model_dump_json(indent=2) + "\n")


def _holds_work(model_dir: Path) -> bool:
    if (model_dir / MANIFEST_NAME).exists() or any(model_dir.glob("*.safetensors")):
        return True
    return checkpoints.newest_whole(model_dir / checkpoints.CHECKPOINTS) is not None


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_shown(item)}" for name, item in value.items())
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
