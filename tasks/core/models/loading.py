"""Load a model and its tokenizer: full checkpoint, LoRA adapter on its base, GGUF file or packaged model."""

from __future__ import annotations

import logging
import re
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ModelLoadError
from tasks.core.models import adapters, checking
from tasks.core.models.config_figures import check_against_weights
from tasks.core.models.explaining import explained
from tasks.core.models.identifying import identify, identity_of, saved_quantization
from tasks.core.models.locating import ModelFiles
from tasks.core.models.placement import choose_device, device_map, quantization_config
from tasks.core.models.specs import ModelSource, ModelSpec, find_source, gguf_argument, read_config
from tasks.core.models.tokenizing import as_list, tokenizer_of
from tasks.core.records import ModelIdentity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "ModelSpec", "identify", "load_model_and_tokenizer", "load_tokenizer"]

logger = logging.getLogger(__name__)

_BITS = {"4bit": 4, "8bit": 8}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer (eval mode, no gradients, its own sampling defaults removed) and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    device: str


def load_model_and_tokenizer(spec: ModelSpec) -> LoadedModel:
    """Load what `spec` names and tell exactly which weights they are.

    An adapter is merged into its base, which makes its answers cost no extra time, where that changes no answer
    (see adapters.py); else the model is peft's. Raises ModelNotFoundError, ModelLoadError, OutOfMemoryError,
    StorageError.
    """
    device = choose_device(spec.device)
    source = find_source(spec, with_weights=True)
    checking.check_weights(source.base.weights_path)
    if source.adapter is not None:
        adapters.check_adapter(source.adapter.directory, source.adapter.model_id)
        checking.check_weights(source.adapter.directory)
    config = read_config(source)
    if source.base.gguf_name is None:
        check_against_weights(config, checking.weight_paths(source.base.directory))
    tokenizer = tokenizer_of(source, config)
    identity = identity_of(source, config, tokenizer)
    with explained(spec.model_id):
        if source.adapter is None:
            model = _load_base(source, config, identity, device)
            if spec.for_training:
                adapters.grow_vocabulary(model, tokenizer, spec.model_id)
        else:
            model = _with_adapter(source, source.adapter, config, identity, device, tokenizer)
    _settle(model, tokenizer, _lasting_name(source))
    logger.info(
        "loaded %s (%s, quantisation %s) on %s", spec.model_id, identity.dtype, identity.quantization, device
    )
    return LoadedModel(model, tokenizer, identity, str(model.device))


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load only the tokenizer (an adapter's own before its base's), with end and padding tokens settled."""
    source = find_source(spec, with_weights=False)
    return tokenizer_of(source, read_config(source))


def _load_base(
    source: ModelSource, config: PretrainedConfig, identity: ModelIdentity, device: str
) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    base, dtype = source.base, getattr(torch, identity.dtype)
    quantization: Any = None
    if base.gguf_name is not None:
        quantization = GgufConfig(dequantize=True)
    elif saved_quantization(config) is None:
        quantization = quantization_config(identity.quantization, dtype)
    placement = device_map(source.spec.device, device, _bytes_in_memory(base, identity))
    if placement is None and identity.quantization != "none":
        placement = {"": device}  # bitsandbytes converts weights where accelerate puts them
    model, found = AutoModelForCausalLM.from_pretrained(
        base.directory,
        config=config,
        dtype=dtype,
        device_map=placement,
        quantization_config=quantization,
        use_safetensors=True,
        trust_remote_code=source.spec.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the sizes
        **gguf_argument(base),
    )
    _check_found(base.model_id, model, found)
    return model


def _check_found(model_id: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ModelLoadError where transformers would fill weights with noise, or leave layers out, and go on."""
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise ModelLoadError(
            f"{model_id} lacks {len(missing)} of its weights, for example {missing[0]}",
            "copy or download the model again; a model of another kind (a classifier, an encoder) cannot be used",
        )
    if found["mismatched_keys"]:
        name, stored, built = sorted(found["mismatched_keys"])[0]
        raise ModelLoadError(
            f"{model_id} has {len(found['mismatched_keys'])} weights of other sizes than its config.json says, for "
            f"example {name}: {list(stored)} in the file, {list(built)} by the configuration",
            "copy or download the model again, with the config.json that belongs to the weights",
        )
    if not unused:
        return
    names = set(model.state_dict())
    layers = [name for name in unused if re.sub(r"\.\d+\.", ".0.", name, count=1) in names]
    if layers:
        raise ModelLoadError(
            f"{model_id} has weights of more layers than its config.json says, for example {layers[0]}; without "
            "them it would be another model",
            "copy or download the model again, with the config.json that belongs to the weights",
        )
    logger.warning(
        "%s: %d weights are not used by %s, for example %s",
        *(model_id, len(unused), type(model).__name__, unused[0]),
    )


def _bytes_in_memory(base: ModelFiles, identity: ModelIdentity) -> int:
    """Estimated from the files' size, which counts 2 bytes a weight for all but quantised or float32 files."""
    if base.gguf_name is not None:
        return 4 * base.weights_path.stat().st_size  # blocks of about 4 bits unpack to 16
    stored = sum(path.stat().st_size for path in checking.weight_paths(base.directory))
    return stored * _BITS.get(identity.quantization, 16) // 16


def _with_adapter(
    source: ModelSource,
    adapter: ModelFiles,
    config: PretrainedConfig,
    identity: ModelIdentity,
    device: str,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    def beside() -> PeftModel:
        model = _load_base(source, deepcopy(config), identity, device)  # loading and merging write into it
        return adapters.put_beside(model, adapter.directory, adapter.model_id, tokenizer)

    quantised = identity.quantization != "none"
    if source.spec.for_training and not quantised:
        return adapters.merge_to_learn_on(beside(), adapter.model_id)
    return adapters.merge_where_equal(beside, adapter.model_id, quantised=quantised)


def _lasting_name(source: ModelSource) -> str:
    """What peft writes into the adapters it saves: a name that finds the base again from any directory."""
    named = source.adapter or source.base
    return str(named.weights_path) if named.source == "local" else named.model_id


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make the model answer by our settings only: eval mode, and no sampling defaults of its own."""
    from transformers import GenerationConfig

    model.eval()
    model.requires_grad_(False)
    own = model.generation_config
    end_ids = sorted({*as_list(getattr(own, "eos_token_id", None)), *as_list(tokenizer.eos_token_id)})
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else own.bos_token_id,
        eos_token_id=end_ids[0] if len(end_ids) == 1 else end_ids,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.config._name_or_path = name
    model.name_or_path = name
