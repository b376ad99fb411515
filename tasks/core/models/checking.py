"""What is checked before weights are read: safe format, whole files, no foreign code, fitting vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PICKLED = ("pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.pt", "*.ckpt")
_GGUF_MAGIC = b"GGUF"


def is_adapter(directory: Path) -> bool:
    """Tell whether the directory holds a peft adapter instead of a full model."""
    return (directory / "adapter_config.json").is_file()


def weight_paths(directory: Path) -> list[Path]:
    """The safetensors files transformers or peft would load; ModelLoadError when there are none.

    Pickled weights (pytorch_model.bin) can run code when they are opened and are therefore refused.
    """
    stem = "adapter_model" if is_adapter(directory) else "model"
    single_path = directory / f"{stem}.safetensors"
    if single_path.is_file():
        return [single_path]
    index_path = directory / f"{stem}.safetensors.index.json"
    if index_path.is_file():
        return _shards(index_path)
    pickled = sorted(p.name for pattern in _PICKLED for p in directory.glob(pattern))
    if pickled:
        raise ModelLoadError(
            f"{directory} has only pickled weights ({pickled[0]}), which can run code when they are opened",
            "if you trust them, convert them once to safetensors: load them with transformers' "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}) and call save_pretrained(<new directory>)",
        )
    raise ModelLoadError(
        f"{directory} has no weights ({single_path.name} or {index_path.name})",
        "point to the directory that holds them, or train or download the model again",
    )


def _shards(index_path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
        foreign = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(
            f"{index_path} is damaged: {error}", "copy or download the model again"
        ) from error
    if foreign is not None:
        raise ModelLoadError(
            f"{index_path} names a weight file outside of the model's folder: {foreign!r}",
            "put all weight files into the model's own folder; nothing outside of it is read",
        )
    paths = [index_path.parent / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelLoadError(
            f"{index_path.parent} lacks {len(missing)} of {len(paths)} weight files: {', '.join(missing[:5])}",
            "copy or download the model again",
        )
    return paths


def check_weights(path: Path) -> None:
    """Open each weight file's header: a cut or damaged file raises ModelLoadError that names it."""
    if path.is_file():
        _check_gguf(path)
        return
    for weight_path in weight_paths(path):
        read_safetensors_dtype(weight_path)


def _check_gguf(path: Path) -> None:
    with path.open("rb") as stream:
        magic = stream.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise ModelLoadError(
            f"{path} is not a GGUF file: it starts with {magic!r} instead of {_GGUF_MAGIC!r}",
            "download the file again; a Git LFS pointer or a web page may lie in its place",
        )


def read_safetensors_dtype(path: Path) -> str | None:
    """Safetensors' name (F32, BF16, …) of the first floating-point tensor's dtype; checks the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            dtypes = (tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
            return next((dtype for dtype in dtypes if dtype in {"F64", "F32", "F16", "BF16"}), None)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ModelLoadError(
            f"{path} is damaged or cut short ({size} bytes): {error}",
            "copy, download or train the model again",
        ) from error


def check_custom_code(directory: Path, model_id: str, trust_remote_code: bool) -> None:
    """Refuse a model that needs Python code from its own repository, unless a person turned that on.

    Models that name such code although transformers has the architecture built in are loaded without it.
    """
    if trust_remote_code:
        return
    from transformers import CONFIG_MAPPING

    config = read_json(directory / "config.json")
    tokenizer_config = read_json(directory / "tokenizer_config.json")
    known = config.get("model_type") in CONFIG_MAPPING
    named = config.get("auto_map") or tokenizer_config.get("auto_map")
    if named and not known:
        raise ModelLoadError(
            f"{model_id} brings Python code of its own (auto_map {json.dumps(named, sort_keys=True)}), "
            "which would run on this machine",
            "read that code; if you trust it, set trust_remote_code = true",
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when the file is absent; ModelLoadError when it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise ModelLoadError(
            f"{path} is damaged: it is nested too deeply", "copy or download the model again"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path} is damaged: {error}", "copy, download or train the model again"
        ) from error
    if not isinstance(content, dict):
        raise ModelLoadError(
            f"{path} is damaged: it holds no JSON object", "copy or download the model again"
        )
    return content


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedding_rows: int, model_id: str) -> None:
    """Refuse a tokenizer that can give token ids for which the model has no embedding row."""
    largest_id = max(tokenizer.get_vocab().values(), default=-1)
    if largest_id >= embedding_rows:
        raise ModelLoadError(
            f"tokenizer and model of {model_id} do not fit each other: the largest token id is {largest_id}, "
            f"but the model has {embedding_rows} embedding rows (token ids 0 to {embedding_rows - 1})",
            "use the tokenizer the model was trained with (its tokenizer.json and tokenizer_config.json)",
        )
