"""The numbers in a model's configuration files, checked before anything is built or set aside for them.

A configuration may ask for a million layers or a matrix that no machine holds; building it would take hours, or all
memory, before the weights turn out not to fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ModelLoadError
from tasks.core.models.checking import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NEXT_STEP = "correct it, or copy or download the model again"
# What a figure of such a name may be at most, and at least; far beyond any model there is.
_BOUNDS = (
    (re.compile(r"num_hidden_layers|n_layers?"), 2_000, 1),
    (re.compile(r"(num_|encoder_|decoder_|num_encoder_|num_decoder_)layers"), 2_000, 0),
    (re.compile(r"vocab_size"), 100_000_000, 1),
    (re.compile(r"hidden_size|n_embd|d_model|(num_attention|num_key_value|n)_heads?"), 10_000_000, 1),
    (re.compile(r"\w*(_size|_dim|_heads|_experts|_rank)|n_inner"), 10_000_000, -1),  # -1 is a way to say none
    (re.compile(r"(max_position_embeddings|n_positions|max_sequence_length)"), 10_000_000_000, -1),
)
_ADAPTER_BOUNDS = (
    (re.compile(r"r|lora_r|rank|num_virtual_tokens|encoder_hidden_size|init_r|target_r"), 100_000, 1),
)
_MAY_BE_INFINITE = re.compile(r"time_step_\w+")
_BITS_IN_BYTE = 8


def check_figures(directory: Path) -> None:
    """Refuse a model's or adapter's configuration with figures that no model has; ModelLoadError names file and key."""
    for path, bounds in (
        (directory / "config.json", _BOUNDS),
        (directory / "adapter_config.json", _ADAPTER_BOUNDS),
    ):
        for key, value in _figures(read_json(path)):
            _check_finite(path, key, value)
            for names, largest, smallest in bounds:
                if names.fullmatch(key.rsplit(".", 1)[-1]) and isinstance(value, int):
                    if not smallest <= value <= largest:
                        raise ModelLoadError(
                            f"{path}: {key} = {_shown(value)} is no figure of a model ({smallest} to {largest:,})",
                            _NEXT_STEP,
                        )
                    break
    rank_path = directory / "adapter_config.json"
    for key, value in (read_json(rank_path).get("rank_pattern") or {}).items():
        if not isinstance(value, int) or not 1 <= value <= _ADAPTER_BOUNDS[0][1]:
            raise ModelLoadError(f"{rank_path}: rank_pattern {key} = {_shown(value)} is no rank", _NEXT_STEP)
    _check_end_ids(directory / "generation_config.json")


def check_against_weights(config: PretrainedConfig, weight_paths: Sequence[Path]) -> None:
    """Refuse a configuration that asks for more weights than the files have bits; ModelLoadError."""
    text = config.get_text_config()
    width, rows, layers = (
        getattr(text, name, None) for name in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    if not (isinstance(width, int) and isinstance(rows, int) and isinstance(layers, int)):
        return
    bits = sum(path.stat().st_size for path in weight_paths) * _BITS_IN_BYTE
    if max(rows * width, layers * width) > bits:
        raise ModelLoadError(
            f"config.json does not fit the weights: it names a vocabulary of {rows:,}, {layers:,} layers and a width "
            f"of {width:,}, but the weight files have only {bits // _BITS_IN_BYTE:,} bytes",
            "copy or download the model again, its configuration and its weights together",
        )


def _figures(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number with its key; of lists, only what is in objects."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _figures(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for item in content:
            if isinstance(item, (dict, list)):
                yield from _figures(item, key)
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield key, content


def _check_finite(path: Path, key: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        if math.isinf(value) and _MAY_BE_INFINITE.fullmatch(key.rsplit(".", 1)[-1]):
            return
        raise ModelLoadError(f"{path}: {key} is {value}, which is no number", _NEXT_STEP)


def _check_end_ids(path: Path) -> None:
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        given = read_json(path).get(key)
        for item in given if isinstance(given, list) else [given]:
            if item is not None and (not isinstance(item, int) or isinstance(item, bool)):
                raise ModelLoadError(f"{path}: {key} = {_shown(item)} is no token id", _NEXT_STEP)


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {int(abs(value).bit_length() * 0.301) + 1} digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
