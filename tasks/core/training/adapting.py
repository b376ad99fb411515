"""Makes a loaded model trainable: a LoRA adapter on frozen (perhaps quantised) weights, or all weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from tasks.core.config import FineTunerConfig
    from tasks.core.records import ModelIdentity

logger = logging.getLogger(__name__)

_SHORT_TOKENS = 256
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"})


def make_trainable(
    model: PreTrainedModel, config: FineTunerConfig, base: ModelIdentity
) -> PreTrainedModel | PeftModel:
    """Prepare `model` in place: which parameters learn, and in float32.

    Raises ConfigError for target_modules that the model does not have, TrainingError for a base that cannot be
    trained as set.
    """
    if config.full_finetuning:
        return model.requires_grad_(True)
    if base.adapter_id is not None and base.quantization != "none":
        raise TrainingError(
            f"{base.adapter_id} is an adapter on quantised weights; a second adapter cannot be put on it",
            "load it unquantised (load_in_4bit = false, load_in_8bit = false), or start from its base",
        )
    return _with_adapter(model, config, base)


def choose_attention(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    """Take plain matrix products for attention where they are faster: short sequences on a CPU.

    PyTorch's fused kernel needs 2 to 6 times as long up to 256 tokens there, most of it in the backward pass
    (bench/training.py); beyond about 400 tokens it wins, and it never holds a score matrix in memory.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    ordered = sorted(lengths)
    mostly, longest = ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]
    if mostly <= _SHORT_TOKENS and longest <= 4 * _SHORT_TOKENS:
        model.set_attn_implementation("eager")


def changes_base(config: FineTunerConfig, base: ModelIdentity) -> bool:
    """Whether the adapter stands on weights that no other loading gives, so that it must be merged to be used."""
    return base.adapter_id is not None or config.loftq_config is not None


def moves_base(config: FineTunerConfig) -> bool:
    """Whether the adapter starts with a part of the base's weights, which is taken out of them in memory."""
    return config.init_lora_weights == "pissa"


def _with_adapter(model: PreTrainedModel, config: FineTunerConfig, base: ModelIdentity) -> PeftModel:
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training

    if config.loftq_config is not None and model.device.type not in ("cuda", "xpu"):
        raise ConfigError(
            f"fine_tuner.loftq_config needs a GPU (peft quantises there); the model is on {model.device}",
            'remove loftq_config, or set device = "cuda"',
        )
    shared = sorted(_EMBEDDINGS.intersection(name.rsplit(".", 1)[-1] for name in config.target_modules))
    if moves_base(config) and not isinstance(config.target_modules, str) and shared:
        raise ConfigError(
            'init_lora_weights = "pissa" takes a part out of the weights it learns on, which others may use too: '
            f"{', '.join(shared)}",
            'leave them out of target_modules, or set init_lora_weights = "default"',
        )
    if base.quantization != "none":
        # Norms and the head in float32; Trainer turns gradient checkpointing on.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    _check_saved_modules(model, config)
    try:
        adapted = get_peft_model(model, _lora_config(config))
    except ValueError as error:
        raise ConfigError(
            f"fine_tuner.target_modules {config.target_modules!r} does not fit {type(model).__name__}: {error}",
            f'take "all-linear" or some of: {", ".join(_linear_names(model))}',
        ) from error
    if base.revision is not None and not base.model_id.startswith("package:"):
        adapted.peft_config["default"].revision = base.revision
    for part in adapted.parameters():
        if part.requires_grad and part.dtype in (torch.float16, torch.bfloat16):
            part.data = part.data.float()  # modules to save and biases, too, learn in float32
    _tell_of_embeddings(adapted, base)
    learnt, total = adapted.get_nb_trainable_parameters()
    logger.info("LoRA adapter of rank %d: %s of %s weights learn", config.rank, f"{learnt:,}", f"{total:,}")
    return adapted


def _lora_config(config: FineTunerConfig) -> LoraConfig:
    from peft import LoftQConfig, LoraConfig

    start: dict[str, Any] = {}
    if config.loftq_config is not None:
        start = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(**config.loftq_config)}
    elif config.init_lora_weights != "default":
        start = {"init_lora_weights": config.init_lora_weights}
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=list(config.modules_to_save) or None,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
        **start,
    )


def _check_saved_modules(model: PreTrainedModel, config: FineTunerConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for wanted in config.modules_to_save:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            there = sorted(
                {name.rsplit(".", 1)[-1] for name in names} - {str(number) for number in range(1000)}
            )
            raise ConfigError(
                f"fine_tuner.modules_to_save names {wanted!r}, which {type(model).__name__} does not have",
                f"take some of: {', '.join(there)}",
            )


def _tell_of_embeddings(adapted: PeftModel, base: ModelIdentity) -> None:
    """Say what is saved when embedding and head are one matrix, and whether new tokens can be learnt."""
    model = adapted.get_base_model()
    ends = {"the embedding": model.get_input_embeddings(), "the head": model.get_output_embeddings()}
    learning = [
        name
        for name, end in ends.items()
        if end is not None and any(part.requires_grad for part in end.parameters())
    ]
    if learning and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        logger.warning(
            "embedding and head of %s are one matrix; %s learn%s apart from it and %s saved in the adapter; a full "
            "model made of it has both matrices",
            *(base.model_id, " and ".join(learning)),
            *(("", "are") if len(learning) > 1 else ("s", "is")),
        )
    rows = int(model.config.get_text_config().vocab_size)
    if rows > base.vocab_size and len(learning) < len(ends):
        logger.warning(
            "%d tokens are new to %s, and %s cannot learn them; set fine_tuner.modules_to_save = "
            '["embed_tokens", "lm_head"] (by the names that the model gives its embedding and head)',
            *(
                rows - base.vocab_size,
                base.model_id,
                " and ".join(name for name in ends if name not in learning),
            ),
        )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of linear layers, as target_modules takes them."""
    names = {
        name.rsplit(".", 1)[-1] for name, part in model.named_modules() if "Linear" in type(part).__name__
    }
    return sorted(names)
