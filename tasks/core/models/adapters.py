"""Puts an adapter on its base so that it answers as peft does: merged where that changes no answer, else beside it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ModelLoadError
from tasks.core.models.checking import check_vocabulary, read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Relative difference of logits that the order of additions explains, by bytes of a weight.
_ROUNDING = {8: 1e-12, 4: 1e-5, 2: 0.0}
# Rounding of merged weights and of activations are independent of each other and add up.
_NOISES = 3.0
# A larger relative difference of logits is no rounding at all, by bytes of a weight.
_LARGEST_ROUNDING = {8: 1e-3, 4: 1e-3, 2: 0.1}
_SETTINGS = "adapter_config.json"
_PROBE_TOKENS = 20
_PROBE_CUTS = (5, 11, 17)
_VIRTUAL_TOKENS = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
    *("ADAPTION_PROMPT", "XLORA", "POLY"),
}
_NAMES_OF_ENDS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_PLACES_OF_ENDS = tuple(
    f"{before}{name}" for before in ("", "model.", "transformer.", "gpt_neox.") for name in _NAMES_OF_ENDS
)


@dataclass(frozen=True, slots=True)
class Merging:
    """How far the logits of merged weights are from the adapter's own, relative, and how far they may be."""

    difference: float
    allowed: float
    largest_rounding: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether no answer changes by more than it does with the shape of a batch (NaN: no)."""
        return self.difference <= self.allowed

    @property
    def is_rounding(self) -> bool:
        """Whether the weights are right but for the rounding of their number format (NaN: no)."""
        return self.difference <= max(self.allowed, self.largest_rounding)


def check_adapter(directory: Path, model_id: str) -> None:
    """Raise ModelLoadError for a kind of adapter whose answers cannot be given as peft gives them."""
    settings = read_json(directory / _SETTINGS)
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind in _VIRTUAL_TOKENS:
        raise ModelLoadError(
            f"{model_id} is an adapter of the kind {kind}, which needs a way of its own through the model at each "
            "step; engines that share steps among rows cannot do that",
            "train a LoRA, DoRA or IA3 adapter instead, or write the answers with peft and evaluate that file",
        )
    if settings.get("alora_invocation_tokens") is not None or settings.get("arrow_config") is not None:
        raise ModelLoadError(
            f"{model_id} is an adapter that is switched on by the text of each row (activated LoRA or Arrow)",
            "train a plain LoRA adapter, or write the answers with peft and evaluate that file",
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise ModelLoadError(
            f"{model_id} began with a random decomposition of its base ({start}), which no loading gives again",
            "save it once more with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    if task not in (None, "CAUSAL_LM"):
        raise ModelLoadError(
            f"{model_id} is an adapter for the task {task}, which gives no text",
            "take one of the task CAUSAL_LM",
        )


def put_beside(
    model: PreTrainedModel, directory: Path, model_id: str, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Wrap `model` with the adapter in `directory`; its vocabulary becomes that of the adapter's weights.

    Raises ModelLoadError when weights of the adapter find no place in the model, or are not there.
    """
    brought = _brought_rows(model, directory)
    if brought is not None:
        check_vocabulary(tokenizer, brought, model_id)
        resize_vocabulary(model, brought)
    else:
        grow_vocabulary(model, tokenizer, model_id, _named_tokens(read_json(directory / _SETTINGS)))
    try:
        adapted, result = _load(model, directory)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ModelLoadError(
            f"{model_id} does not fit its base: {' '.join(str(error).split())[:300]}",
            "write the base it was trained on into base_model_name_or_path of its adapter_config.json",
        ) from error
    if result.missing_keys:
        raise ModelLoadError(
            f"{model_id} lacks {len(result.missing_keys)} of the weights that its adapter_config.json names, for "
            f"example {result.missing_keys[0]}",
            "copy or train the adapter again; its base may also be another one than it was trained on",
        )
    if result.unexpected_keys:
        logger.warning(
            "%s has %d weights for which its base has no place (for example %s); they change nothing",
            *(model_id, len(result.unexpected_keys), result.unexpected_keys[0]),
        )
    adapted.requires_grad_(False)
    return adapted.eval()


def _load(model: PreTrainedModel, directory: Path) -> tuple[PeftModel, Any]:
    """What PeftModel.from_pretrained does, with the keys that it does not tell."""
    import torch
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = True
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    with torch.random.fork_rng():  # some kinds take a random decomposition of the base's weights
        torch.manual_seed(0)
        adapted = kind(model, config, "default")
    result = adapted.load_adapter(
        str(directory),
        "default",
        torch_device=str(model.device),
        key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
    )
    return adapted, result


def merge_where_equal(beside: Callable[[], PeftModel], model_id: str, *, quantised: bool) -> PreTrainedModel:
    """Return merged weights when their logits are the adapter's own up to rounding, else the adapter beside its base.

    `beside` loads base and adapter; it is called again when merging has spoilt them.
    """
    from tasks.core.memory.device_memory import release

    if quantised:
        logger.info(
            "the adapter %s stays beside its base: merging would round it to the base's bits", model_id
        )
        return beside()
    merged, reason = _try_merging(beside())
    if merged is not None:
        logger.info("the adapter %s is merged into its base: %s", model_id, reason)
        return merged
    release("cpu")
    logger.info("the adapter %s stays beside its base, which answers more slowly: %s", model_id, reason)
    return beside()


def merge_to_learn_on(adapted: PeftModel, model_id: str) -> PreTrainedModel:
    """Merge whatever rounding that costs; ModelLoadError when more than rounding would change."""
    merged, merging = merge(adapted)
    if not merging.is_rounding:
        raise ModelLoadError(
            f"{model_id} cannot be merged into its base, which learning further needs: the logits would differ by "
            f"{merging.difference:.1%}",
            "start from its base, or from a full model",
        )
    return merged


def _try_merging(adapted: PeftModel) -> tuple[PreTrainedModel | None, str]:
    try:
        merged, merging = merge(adapted)
    except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        from tasks.core.memory.device_memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        return None, f"it cannot be merged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    figures = f"logits differ by {merging.difference:.1e} (rounding: up to {merging.allowed:.1e})"
    return (merged if merging.is_exact else None), figures


def merge(adapted: PeftModel) -> tuple[PreTrainedModel, Merging]:
    """Put an adapter into the weights (they are spoilt if it cannot be) and measure what that changed.

    Tied embeddings of which the adapter changes one are untied first, and the configuration says so afterwards.
    """
    ids = _probe(adapted)
    own, noise = _logits(adapted, ids), _noise(adapted, ids)
    untie_changed(adapted)
    bytes_per_weight = next(part for part in adapted.get_base_model().parameters()).element_size()
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    difference = _relative(_logits(merged, ids), own)
    allowed = max(_ROUNDING.get(bytes_per_weight, 0.0), _NOISES * noise)
    return merged, Merging(difference, allowed, _LARGEST_ROUNDING.get(bytes_per_weight, 0.0))


def _probe(adapted: PeftModel) -> torch.Tensor:
    """Token ids [1, tokens]: some of any kind, the newest of the vocabulary, and those that an adapter names."""
    import torch

    rows = adapted.get_base_model().get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, rows, (_PROBE_TOKENS,), generator=generator).tolist()
    tokens = _named_tokens(vars(adapted.active_peft_config))
    return torch.tensor([[*ids, *range(max(0, rows - 4), rows), *tokens[:8]]], device=adapted.device)


def _named_tokens(settings: dict[str, Any]) -> list[int]:
    """The token ids whose embeddings an adapter brings one by one (LoRA's or an adapter of that kind alone)."""
    named = settings.get("trainable_token_indices") or settings.get("token_indices") or []
    return [token for part in named.values() for token in part] if isinstance(named, dict) else list(named)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float() if logits.element_size() < 4 else logits[0]


def _noise(model: Any, ids: torch.Tensor) -> float:
    """How much the logits of a token change with the number of tokens computed beside it."""
    import torch

    whole = _logits(model, ids)
    apart = torch.stack([_logits(model, ids[:, : cut + 1])[-1] for cut in _PROBE_CUTS])
    return _relative(apart, whole[list(_PROBE_CUTS)])


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-9))


def changes_tied(settings: dict[str, Any], config: PretrainedConfig) -> bool:
    """Whether an adapter with these settings changes an end of a model whose embedding and head are one matrix."""
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return False
    targets = settings.get("target_modules") or ()
    if isinstance(targets, str):
        return targets != "all-linear" and any(re.fullmatch(targets, place) for place in _PLACES_OF_ENDS)
    return any(name.rsplit(".", 1)[-1] in _NAMES_OF_ENDS for name in targets)


def untie_changed(adapted: PeftModel) -> bool:
    """Give the head weights of its own when an adapter changes one of two tied matrices; tell whether it did.

    peft adds to each of the two layers by itself; put into one shared matrix, the sums would add up in both.
    """
    import torch

    model = adapted.get_base_model()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if ends[1] is None or not any(_is_changed(end) for end in ends) or _share_tokens(*ends):
        return False
    embedding, head = (_innermost(end) for end in ends)
    if embedding.weight is not head.weight and embedding.weight.data_ptr() != head.weight.data_ptr():
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return True


def _is_changed(end: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _share_tokens(embedding: Any, head: Any) -> bool:
    """Whether both ends learn the same rows in one place, which may stay tied."""
    mine, theirs = (getattr(end, "token_adapter", None) for end in (embedding, head))
    return mine is not None and theirs is not None and theirs.tied_adapter is mine


def _innermost(end: Any) -> Any:
    """The base's own layer under all that peft has put around it."""
    while True:
        inner = getattr(end, "original_module", None) if hasattr(end, "original_module") else None
        inner = inner if inner is not None else vars(end).get("_modules", {}).get("base_layer")
        if inner is None or inner is end:
            return end
        end = inner


def _brought_rows(model: PreTrainedModel, directory: Path) -> int | None:
    """Rows of the embedding or head that an adapter's weights have; None when it brings none."""
    from safetensors import safe_open

    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if id(module) in ends}
    found: dict[str, int] = {}
    with safe_open(directory / "adapter_model.safetensors", framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            parts = key.split(".")
            if not names & set(parts):
                continue
            shape = tensors.get_slice(key).get_shape()
            if "lora_embedding_A" in parts:
                found[key] = shape[1]
            elif ("lora_B" in parts and len(shape) == 2) or (parts[-1] == "weight" and "lora_A" not in parts):
                found[key] = shape[0]
    rows = set(found.values())
    if len(rows) > 1:
        raise ModelLoadError(
            f"{directory} brings embeddings of {' and '.join(map(str, sorted(rows)))} rows, which do not fit "
            "each other",
            "train the adapter again on a base whose embeddings were resized once, before the adapter was put on",
        )
    return rows.pop() if rows else None


def grow_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_id: str, learnt: Sequence[int] = ()
) -> None:
    """Make room for the tokens that the tokenizer has and the model has not; those not `learnt` are told."""
    before = int(model.get_input_embeddings().weight.shape[0])
    vocabulary = tokenizer.get_vocab()
    rows = max([*vocabulary.values(), *learnt], default=-1) + 1
    if rows <= before:
        return
    resize_vocabulary(model, rows)
    new = [token for token, number in vocabulary.items() if number >= before and number not in set(learnt)]
    if new:
        logger.warning(
            "the tokenizer of %s has %d tokens that its weights do not know, for example %r: they mean nothing yet",
            *(model_id, len(new), sorted(new)[0]),
        )


def resize_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give embedding and head `rows` rows; new ones are the mean of the old, the same at each loading."""
    import torch

    before = int(model.get_input_embeddings().weight.shape[0])
    if rows == before:
        return
    with torch.random.fork_rng():
        model.resize_token_embeddings(rows, mean_resizing=False)
    logger.info("the vocabulary of %d rows becomes one of %d", before, rows)
    if rows < before:
        return
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in (getattr(end, "weight", None), getattr(end, "bias", None)):
            if values is not None and values.shape[0] == rows:
                values.data[before:] = values.data[:before].float().mean(dim=0).to(values.dtype)
