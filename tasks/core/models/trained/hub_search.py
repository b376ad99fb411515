"""Questions to the Hub while a model is looked for: is this one usable, which is this user's newest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.errors import first_line
from tasks.core.models.locating import is_cached, is_hub_name, is_offline

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_MODELS_LOOKED_AT = 20


class NotUsable(Exception):  # noqa: N818 -- an answer, which the search notes down before it goes on
    """Why a Hub model, or the Hub, cannot be used."""


class HubSilent(NotUsable):
    """The Hub gave no answer; what the local cache holds can still be used."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the Hub at its present commit (None: not asked). `problem` says why it cannot be loaded."""

    model_id: str
    revision: str | None
    problem: str | None = None
    remark: str = ""


def find(model_id: str) -> HubModel:
    """Look one model up by name, in the local cache when the Hub is out of reach; raises NotUsable."""
    if not is_hub_name(model_id):
        raise NotUsable("not a path that exists, and not a valid Hub id")
    if is_offline():
        if not is_cached(model_id):
            raise NotUsable("not in the local cache, and HF_HUB_OFFLINE forbids asking the Hub")
        return HubModel(model_id, None, remark=", from the local cache")
    if model_id.endswith(".gguf"):
        repo_id, _, file = model_id.rpartition("/")
        with _answers():
            info = _api_model_info(repo_id)
        if file not in _file_names(info):
            raise NotUsable(f"{repo_id} has no file {file}")
        return HubModel(model_id, info.sha)
    try:
        with _answers():
            found = _judged(_api_model_info(model_id))
    except HubSilent:
        if is_cached(model_id):
            return HubModel(model_id, None, remark=", from the local cache (the Hub did not answer)")
        raise
    if found.problem is not None:
        raise NotUsable(found.problem)
    return found


def newest_of(user_id: str) -> Iterator[HubModel]:
    """The user's latest models, newest first, unusable ones included; raises NotUsable without the Hub."""
    if is_offline():
        raise NotUsable("not searched: HF_HUB_OFFLINE forbids asking the Hub")
    from huggingface_hub import HfApi

    with _answers():
        yield from map(
            _judged,
            HfApi().list_models(author=user_id, sort="last_modified", limit=_MODELS_LOOKED_AT, full=True),
        )


def _api_model_info(repo_id: str) -> ModelInfo:
    from huggingface_hub import HfApi

    return HfApi().model_info(repo_id)


def _judged(info: ModelInfo) -> HubModel:
    names = _file_names(info)
    problem = None
    if not names & {"config.json", "adapter_config.json"}:
        problem = "no config.json or adapter_config.json"
    elif not any(name.endswith(".safetensors") and "/" not in name for name in names):
        problem = "no safetensors weights"
    return HubModel(info.id, info.sha, problem)


def _file_names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


@contextmanager
def _answers() -> Iterator[None]:
    """Turn a Hub that refuses or does not answer into NotUsable."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise NotUsable("does not exist, or HF_TOKEN does not allow to see it") from error
    except errors.HFValidationError as error:
        raise NotUsable("not a valid Hub id") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's base error
        raise HubSilent(f"the Hub did not answer: {first_line(error)}") from error
