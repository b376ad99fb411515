"""Writes trained weights: an adapter alone, or a full model, so that they can be loaded anywhere."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import TrainingError
from tasks.core.files import flush_to_disk, force_to_disk
from tasks.core.models.adapters import merge
from tasks.core.prompts.chat_template import set_template
from tasks.core.training.checkpoints import storing

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PARTIAL = ".publishing"


def save_weights(
    model: PreTrainedModel | PeftModel, directory: Path, initial_adapter_dir: Path | None = None
) -> None:
    """Write the adapter of a PeftModel, or all weights of a full model, with their configuration."""
    if hasattr(model, "peft_config"):
        initial = None if initial_adapter_dir is None else str(initial_adapter_dir)
        # peft would draw up a card beside each checkpoint; a model gets ours when it is published.
        model.create_or_update_model_card = lambda _: None
        # "auto" would look the base up on the Hub to see whether its vocabulary was changed; it never is here.
        with warnings.catch_warnings():
            if initial is not None:  # peft advises to do what is being done here
                warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
            model.save_pretrained(
                str(directory),
                save_embedding_layers=_learns_embeddings(model),
                path_initial_model_for_weight_conversion=initial,
            )
    else:
        was_cached, model.config.use_cache = model.config.use_cache, True  # off while training only
        try:
            model.save_pretrained(str(directory))
        finally:
            model.config.use_cache = was_cached


def publish_files(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    model_dir: Path,
    *,
    base_model_id: str,
    card: str,
    initial_adapter_dir: Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Put model, tokenizer with chat template, the ends of its answers, and model card into `model_dir`.

    `chat_template` takes the place of the tokenizer's own: the one that was trained with, where it is another.
    All is written beside and flushed to disk, then moved into place file by file; without a manifest, which the
    caller writes last, none of it counts as a model. `initial_adapter_dir` holds the first weights of an adapter
    that took them out of its base: what is written is the difference, which fits the base as others have it.
    Raises StorageError; the same training then goes on from its last checkpoint, which gives the same weights.
    """
    partial_dir = model_dir / _PARTIAL
    with storing(model_dir):
        shutil.rmtree(partial_dir, ignore_errors=True)
        partial_dir.mkdir(parents=True)
        save_weights(model, partial_dir, initial_adapter_dir)
        if chat_template is not None:
            set_template(tokenizer, chat_template)
        tokenizer.save_pretrained(str(partial_dir))
        _save_ends(model, tokenizer, partial_dir)
        (partial_dir / "README.md").write_text(card, encoding="utf-8")
        if hasattr(model, "peft_config"):
            _name_base(partial_dir / "adapter_config.json", base_model_id)
        for path in sorted(partial_dir.iterdir()):
            force_to_disk(path)
            path.replace(model_dir / path.name)
        partial_dir.rmdir()
    flush_to_disk(model_dir)


def _save_ends(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Name all tokens that end an answer where transformers and vLLM look for them, for an adapter too."""
    from tasks.core.models.tokenizing import eos_token_ids

    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = list(eos_token_ids(model, tokenizer))
    config.save_pretrained(str(directory))


def merged(model: PeftModel) -> PreTrainedModel:
    """Put the adapter into the weights it was trained on; they are a full model then.

    Raises TrainingError when that would give other answers than the trained model's; what rounding to 16 bits
    costs is told.
    """
    full, merging = merge(model.eval())
    if not merging.is_rounding:
        raise TrainingError(
            f"the adapter cannot be put into its base: the logits would differ by {merging.difference:.1%}",
            'train on a full model instead of an adapter, or set target_modules = "all-linear"',
        )
    if not merging.is_exact:
        logger.warning(
            "the published weights are rounded to the base's number format: logits differ by %.1e from those of the "
            'trained model (dtype = "float32" keeps them)',
            merging.difference,
        )
    return full


def trained_weights_are_finite(model: PreTrainedModel | PeftModel) -> bool:
    """Tell whether all weights that learnt are numbers."""
    import torch

    return all(bool(torch.isfinite(local(part)).all()) for part in model.parameters() if part.requires_grad)


def checksums(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """A sum over the bits of each weight that learns, which changes with any of them.

    Of a model that several processes hold, it is that of the part that lies here.
    """
    import torch

    return {
        name: int(local(part).detach().float().view(torch.int32).sum(dtype=torch.int64))
        for name, part in model.named_parameters()
        if part.requires_grad
    }


def local(part: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies in this process: all of it, unless several processes hold it."""
    to_local = getattr(part, "to_local", None)
    return part if to_local is None else to_local()


def _name_base(config_path: Path, base_model_id: str) -> None:
    """Name the base so that it is found on another machine too; peft would write where it lay on this one."""
    settings: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_model_id
    config_path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _learns_embeddings(model: PeftModel) -> bool:
    targets = model.peft_config["default"].target_modules or ()
    embeddings = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"}
    return not isinstance(targets, str) and bool(embeddings & {name.rsplit(".", 1)[-1] for name in targets})
