"""From a model's name to files on this disk: a path, a packaged model, or a Hub snapshot pinned to a commit."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.core.errors import ModelLoadError, ModelNotFoundError, first_line
from tasks.core.files import exists
from tasks.core.models import packaged
from tasks.core.models.checking import read_json

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_HUB_GGUF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(?P<file>[^/\\]+\.gguf)")
_HUB_ID_LIMIT = 300  # far above what the Hub allows
_COMMIT = re.compile(r"[0-9a-f]{40}")

_SETTINGS_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_WEIGHT_PATTERNS = ("model*.safetensors", "adapter_model*.safetensors")  # never pickled weights


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where one model's files lie. `revision`: Hub commit or package version; None for a local path."""

    model_id: str
    directory: Path
    source: Literal["local", "package", "hub"]
    gguf_name: str | None = None
    revision: str | None = None

    @property
    def weights_path(self) -> Path:
        """The GGUF file, or the directory with the safetensors files."""
        return self.directory if self.gguf_name is None else self.directory / self.gguf_name


def locate(
    model_id: str, revision: str | None = None, *, with_weights: bool = True, with_code: bool = False
) -> ModelFiles:
    """Find a model; download it from the Hub when it is not local. An existing path wins over a Hub id.

    `with_weights=False` fetches configuration and tokenizer only, `with_code` also the repository's Python
    files. Raises ModelNotFoundError, ModelLoadError (access refused, Hub out of reach), StorageError.
    """
    if model_id.startswith(packaged.PREFIX):
        version = packaged.find_packaged_file(model_id).version
        return ModelFiles(model_id, packaged.package_model_dir(model_id), "package", revision=version)
    path = Path(model_id).expanduser()
    if exists(path):
        if revision is not None:
            logger.warning("revision %s is ignored: %s is a local path", revision, model_id)
        return _local(model_id, path.resolve())
    gguf = _HUB_GGUF.fullmatch(model_id)
    if gguf is not None:
        directory = _snapshot(gguf["repo"], revision, [*_SETTINGS_PATTERNS, gguf["file"]])
        return ModelFiles(model_id, directory, "hub", gguf["file"], _commit(directory))
    if not is_hub_name(model_id):
        raise ModelNotFoundError(f"there is no file or directory {model_id}", "correct the path")
    weights = _WEIGHT_PATTERNS if with_weights else ()
    directory = _snapshot(
        model_id, revision, [*_SETTINGS_PATTERNS, *weights, *(["*.py"] if with_code else [])]
    )
    return ModelFiles(model_id, directory, "hub", revision=_commit(directory))


def _local(model_id: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"{path} is not a model: a directory or a .gguf file is needed",
                "point to the directory that holds config.json and the weights",
            )
        return ModelFiles(model_id, path.parent, "local", gguf_name=path.name)
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise ModelLoadError(
                f"{path} holds {len(ggufs)} GGUF files: {', '.join(ggufs)}",
                f"name one of them, for example {path / ggufs[0]}",
            )
        return ModelFiles(model_id, path, "local", gguf_name=ggufs[0])
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"{path} is no model directory: it has neither config.json nor adapter_config.json",
            "point to the directory that holds one of them; `tuneproof models` lists the fine-tuned ones",
        )
    return ModelFiles(model_id, path, "local")


def _snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a Hub repository at one commit, from the cache or downloaded. HF_TOKEN is read by the library."""
    from huggingface_hub import errors, snapshot_download

    name = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        # Subfolders hold the same weights in other formats (onnx/, original/).
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is gated: its owner wants its terms accepted first",
            f"accept them at https://huggingface.co/{repo_id} and set HF_TOKEN to a token of that account",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo_id} has no revision {revision}", "take a branch, a tag or a full commit hash of it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the Hub has no model {name} that you may see, and there is no such local path",
            "check the spelling; for a private model set HF_TOKEN",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} is neither a local path nor whole in the local Hub cache, and the Hub was not reached "
            f"({_why_unreached()})",
            "correct the path or, for a Hub model, connect once so that it can be downloaded",
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelLoadError(
            f"the Hub did not deliver {name}: {first_line(error)}", "try again in a few minutes"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{repo_id!r} is neither a local path nor a valid Hub id", "correct the name"
        ) from error


def _why_unreached() -> str:
    return "HF_HUB_OFFLINE is set" if is_offline() else "no connection"


def is_hub_name(model_id: str) -> bool:
    """Tell whether a name has the form of a Hub model (`user/name`, `name`) or of a GGUF file in one."""
    if len(model_id) > _HUB_ID_LIMIT:
        return False
    return _HUB_ID.fullmatch(model_id) is not None or _HUB_GGUF.fullmatch(model_id) is not None


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE forbids asking the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _commit(snapshot_dir: Path) -> str | None:
    return snapshot_dir.name if _COMMIT.fullmatch(snapshot_dir.name) else None


def is_there(model_id: str) -> bool:
    """Tell, without a download, whether a base model can be had: on disk, packaged, cached, or maybe online."""
    if model_id.startswith(packaged.PREFIX):
        try:
            packaged.find_packaged_file(model_id)
        except ModelNotFoundError:
            return False
        return True
    if exists(Path(model_id).expanduser()):
        return True
    if not is_hub_name(model_id):
        return False
    # Asking the Hub costs a round trip for each model listed; loading will tell.
    return not is_offline() or is_cached(model_id)


def check_model(model_id: str) -> None:
    """Raise ModelNotFoundError when a model can be neither here nor on the Hub; downloads nothing."""
    if model_id.startswith(packaged.PREFIX):
        packaged.find_packaged_file(model_id)
    elif not is_there(model_id):
        offline = " nor in the local Hub cache, and HF_HUB_OFFLINE is set" if is_hub_name(model_id) else ""
        raise ModelNotFoundError(
            f"there is no file or directory {model_id}{offline}",
            "correct the path"
            + (" or, for a Hub model, connect once so that it can be downloaded" if offline else ""),
        )


def is_cached(model_id: str) -> bool:
    """Tell whether the local Hub cache holds (at least the configuration of) a Hub model."""
    from huggingface_hub import try_to_load_from_cache

    gguf = _HUB_GGUF.fullmatch(model_id)
    repo_id = gguf["repo"] if gguf else model_id
    files = [gguf["file"]] if gguf else ["config.json", "adapter_config.json"]
    return any(isinstance(try_to_load_from_cache(repo_id, file), str) for file in files)


def base_of(adapter_dir: Path) -> tuple[str, str | None]:
    """The base's name and revision (None: its newest) as the adapter's files tell.

    A local base that has moved together with the adapter is found beside it. Raises ModelLoadError when the
    adapter names no base. Whether the base exists is for `locate` to say.
    """
    settings = read_json(adapter_dir / "adapter_config.json")
    base_id = settings.get("base_model_name_or_path")
    if not isinstance(base_id, str) or not base_id:
        raise ModelLoadError(
            f"{adapter_dir / 'adapter_config.json'} names no base model",
            "write the base's path or Hub id into base_model_name_or_path",
        )
    # Our own manifest pins the commit that was trained on; peft leaves its revision empty.
    trained_on = read_json(adapter_dir / "tuneproof_manifest.json")
    pinned = trained_on.get("base_model_revision") if trained_on.get("base_model_id") == base_id else None
    revision = pinned or settings.get("revision")
    if not is_there(base_id):
        beside = adapter_dir.resolve().parent / Path(base_id).name
        if (beside / "config.json").is_file():
            return str(beside), None
    elif Path(base_id).expanduser().exists() or base_id.startswith("package:"):
        return base_id, None  # revisions mean something on the Hub only
    return base_id, revision


def missing_base(directory: Path) -> str | None:
    """The name of an adapter's base that is not there; None for a full model or when it is there."""
    if not (directory / "adapter_config.json").is_file():
        return None
    base_id, _ = base_of(directory)
    return None if is_there(base_id) else base_id
