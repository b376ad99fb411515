"""What a training is: everything that shapes the trained weights, so that two of them are never mixed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tasks.core.errors import RunKeyMismatchError
from tasks.core.files import write_atomically
from tasks.core.models.registry import MANIFEST_NAME
from tasks.core.records import Record
from tasks.core.training import checkpoints

if TYPE_CHECKING:
    from tasks.core.config import FineTunerConfig
    from tasks.core.records import ModelIdentity
    from tasks.core.training.rows import TrainingData

logger = logging.getLogger(__name__)

IDENTITY_NAME = "identity.json"

# Settings that only change names, places, speed or what is written down; all others shape the weights.
_WITHOUT_EFFECT = {
    *("run_name", "run_name_prefix", "run_name_suffix", "device", "trust_remote_code"),
    *("base_model_id", "base_model_revision", "dataset_num_proc", "max_rows"),
    *("training_data_id", "training_data_split", "training_data_revision"),
    *("validation_data_id", "validation_data_split", "validation_data_revision"),
    *("question_column", "ground_truth_column", "system_prompt_column", "system_prompt_override_text"),
    *("question_template", "reasoning_column"),
    *("device_train_batch_size", "device_validation_batch_size", "grad_accumulation"),
    *("use_gradient_checkpointing", "log_steps", "log_first_step", "save_steps", "save_total_limit"),
    *("resume", "push_to_hub", "hf_user_id", "report_to", "dtype", "load_in_4bit", "load_in_8bit"),
    *("chat_template", "chat_template_kwargs"),  # both are in the template that the trained model gets
}
# They shape the weights of one kind of training only.
_ADAPTER_ONLY = {
    *("rank", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "loftq_config"),
    *("use_dora", "init_lora_weights", "modules_to_save"),
}
# Settings that came later: at their defaults a training is the one that it was without them.
_ADDED_LATER = {
    *("use_dora", "init_lora_weights", "warmup_ratio", "max_grad_norm", "neftune_noise_alpha"),
    *("early_stopping_patience", "modules_to_save"),
}


class TrainingIdentity(Record):
    """`models/<run>/identity.json`: written before the first step."""

    settings: dict[str, Any]

    @classmethod
    def of(
        cls, config: FineTunerConfig, base: ModelIdentity, data: TrainingData, dtype: str
    ) -> TrainingIdentity:
        """Collect the identity; the batch counts as a whole, however it is cut to fit memory."""
        dropped = _WITHOUT_EFFECT | (_ADAPTER_ONLY if config.full_finetuning else set())
        defaults = type(config)().model_dump(mode="json")
        settings = {
            name: value
            for name, value in config.model_dump(mode="json").items()
            if name not in dropped and not (name in _ADDED_LATER and value == defaults[name])
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
