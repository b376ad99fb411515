"""Which weights answer, exactly: a ModelIdentity from the files, without weights in memory."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ModelLoadError
from tasks.core.models import checking
from tasks.core.models.adapters import changes_tied
from tasks.core.models.digests import weights_sha256
from tasks.core.models.locating import ModelFiles
from tasks.core.models.packaged import CONVERTED_DTYPE
from tasks.core.models.placement import Quantization, answering_dtype
from tasks.core.models.specs import ModelSource, ModelSpec, find_source, read_config
from tasks.core.models.tokenizing import as_list, tokenizer_of
from tasks.core.records import ModelIdentity

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def identify(spec: ModelSpec) -> ModelIdentity:
    """The identity `load_model_and_tokenizer` would report, without loading weights.

    Local files are digested once and remembered. Raises as loading does, except for damaged weights.
    """
    source = find_source(spec, with_weights=False)
    config = read_config(source)
    if source.base.source == "hub" and spec.dtype is None and _config_dtype(config) is None:
        source = find_source(spec, with_weights=True)  # only the weight files tell the dtype
    return identity_of(source, config, tokenizer_of(source, config))


def identity_of(
    source: ModelSource, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> ModelIdentity:
    """Identity of located files; the settings' dtype and quantisation are part of it."""
    from tasks.core.prompts.thought_markers import find_markers
    from tasks.core.prompts.tokens import chat_template_sha256

    base, adapter = source.base, source.adapter
    named = base if adapter is None else adapter
    identity = ModelIdentity(
        model_id=named.model_id,
        revision=named.revision,
        weights_sha256=_digest(base),
        base_model_id=None if adapter is None else base.model_id,
        adapter_id=None if adapter is None else adapter.model_id,
        adapter_sha256=None if adapter is None else _digest(adapter),
        quantization=quantization_of(source, config),
        dtype=_dtype(source, config),
        chat_template_sha256=chat_template_sha256(tokenizer),
        vocab_size=config.get_text_config().vocab_size,
        unties_embeddings=adapter is not None
        and changes_tied(checking.read_json(adapter.directory / "adapter_config.json"), config),
        template_end=_template_end(source, config, tokenizer),
        thought_markers=find_markers(tokenizer).flat,
    )
    _warn_of_differences(source, identity)
    return identity


def _template_end(
    source: ModelSource, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The end token that only the chat template names; None where the model's configuration has it as well."""
    from tasks.core.prompts.chat_template import turn_end_id

    end = turn_end_id(tokenizer)
    generation = checking.read_json(source.base.directory / "generation_config.json")
    configured = generation.get("eos_token_id") if generation else config.get_text_config().eos_token_id
    if end is None or end in (*as_list(configured), tokenizer.eos_token_id):
        return None
    return str(tokenizer.convert_ids_to_tokens(end))


def _digest(files: ModelFiles) -> str:
    """A Hub commit fixes every file; anything on disk is digested."""
    if files.source == "hub" and files.revision is not None:
        name = "" if files.gguf_name is None else f"/{files.gguf_name}"
        return f"hub:{files.revision}{name}"
    return weights_sha256(files.weights_path)


def quantization_of(source: ModelSource, config: PretrainedConfig) -> Quantization:
    """The settings' quantisation, or the one a checkpoint was saved with; ModelLoadError if they differ."""
    spec = source.spec
    wanted: Quantization = "4bit" if spec.load_in_4bit else "8bit" if spec.load_in_8bit else "none"
    saved = saved_quantization(config)
    if wanted != "none" and source.base.gguf_name is not None:
        raise ModelLoadError(
            f"{source.base.model_id} is a GGUF file, which cannot be loaded in {wanted} as well",
            f"set load_in_{wanted} = false, or save the model as safetensors first",
        )
    if wanted != "none" and saved is not None and saved != wanted:
        raise ModelLoadError(
            f"{source.base.model_id} was saved with quantisation {saved}; it cannot be loaded in {wanted}",
            f"set load_in_{wanted} = false, or take the unquantised model",
        )
    if saved == "4bit":
        return "4bit"
    return "8bit" if saved == "8bit" else wanted


def saved_quantization(config: PretrainedConfig) -> str | None:
    """`4bit`, `8bit` or another method's name for a checkpoint saved quantised; None for a plain one."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(values.get("quant_method", "unknown"))
    if method == "gguf":
        return None
    return "4bit" if values.get("load_in_4bit") else "8bit" if values.get("load_in_8bit") else method


def _dtype(source: ModelSource, config: PretrainedConfig) -> str:
    """The setting, else the stored one, as far as the processor computes fast in it.

    Training chooses from the stored one, see precision.py; the layers of quantised weights are bitsandbytes' own.
    """
    spec = source.spec
    if spec.dtype is not None:
        return spec.dtype
    stored = _stored_dtype(source, config)
    if spec.for_training or saved_quantization(config) or quantization_of(source, config) != "none":
        return stored
    computed = answering_dtype(stored, spec.device)
    if computed != stored:
        _tell_other_dtype(source.base.model_id, stored, computed)
    return computed


@functools.cache
def _tell_other_dtype(model_id: str, stored: str, computed: str) -> None:
    """Once a process: a model is identified before it is loaded, and more than once."""
    logger.info(
        "%s answers in %s: this processor has no arithmetic in %s, which its weights are stored in; "
        'dtype = "bfloat16" takes half of the memory and several times as long',
        *(model_id, computed, stored),
    )


def _stored_dtype(source: ModelSource, config: PretrainedConfig) -> str:
    """The configuration's dtype, else that of the first weights (as transformers does)."""
    if source.base.gguf_name is not None:
        return CONVERTED_DTYPE
    configured = _config_dtype(config)
    if configured is not None:
        return configured
    for path in checking.weight_paths(source.base.directory):
        found = checking.read_safetensors_dtype(path)
        if found is not None:
            return _SAFETENSORS_DTYPES[found]
    return "float32"


def _config_dtype(config: PretrainedConfig) -> str | None:
    dtype = config.get_text_config().dtype or config.dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _warn_of_differences(source: ModelSource, identity: ModelIdentity) -> None:
    """Tell when base weights or chat template are not those that the manifest says the model was trained with."""
    named = source.base if source.adapter is None else source.adapter
    manifest = checking.read_json(named.directory / "tuneproof_manifest.json")
    trained_on, template = manifest.get("base_weights_sha256"), manifest.get("chat_template_sha256")
    if source.adapter is not None and trained_on is not None and trained_on != identity.weights_sha256:
        logger.warning(
            "%s was trained on other weights of %s (%s…) than those found now (%s…); its answers may suffer",
            *(named.model_id, source.base.model_id, trained_on[:12], identity.weights_sha256[:12]),
        )
    if template is not None and template != identity.chat_template_sha256:
        logger.warning(
            "%s was trained with another chat template (%s…) than it is asked with now (%s…); its answers may suffer",
            *(named.model_id, template[:12], identity.chat_template_sha256[:12]),
        )
