"""What to load (`ModelSpec`) and all files that belong to it (`ModelSource`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, ModelLoadError, ModelNotFoundError
from tasks.core.models import checking
from tasks.core.models.config_figures import check_figures
from tasks.core.models.explaining import explained
from tasks.core.models.locating import ModelFiles, base_of, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tasks.core.config import FineTunerConfig, InferencerConfig

DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What to load and how. `device` is auto, cpu, cuda, cuda:N or mps.

    `dtype` None keeps the checkpoint's, as far as the processor computes fast in it (see placement.py).

    `for_training`: all weights are wanted as one plain model, so an adapter is merged whatever rounding that costs,
    and tokens that the tokenizer has and the model has not get a row each.
    `chat_template` is Jinja text in the place of the tokenizer's own template.
    """

    model_id: str
    revision: str | None = None
    dtype: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    device: str = "auto"
    trust_remote_code: bool = False
    for_training: bool = False
    chat_template: str | None = None

    @classmethod
    def of_base(cls, settings: FineTunerConfig) -> ModelSpec:
        """The base model of a training."""
        return cls(settings.base_model_id, revision=settings.base_model_revision, **_ways_of(settings))

    @classmethod
    def of_answering(cls, settings: InferencerConfig, model_id: str, revision: str | None) -> ModelSpec:
        """A model that answers in the way of the section."""
        return cls(model_id, revision=revision, **_ways_of(settings))

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are both true", "keep one of them")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype {self.dtype!r} is not known", f"take null or one of {', '.join(DTYPES)}"
            )


def _ways_of(settings: FineTunerConfig | InferencerConfig) -> dict[str, Any]:
    """What both sections say about how a model is loaded."""
    names = ("dtype", "load_in_4bit", "load_in_8bit", "device", "trust_remote_code", "chat_template")
    return {name: getattr(settings, name) for name in names}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """All files of one spec: the base's (or the model's own), and the adapter's when there is one."""

    spec: ModelSpec
    base: ModelFiles
    adapter: ModelFiles | None

    @property
    def tokenizer_files(self) -> ModelFiles:
        """An adapter that brings a tokenizer was trained with it, its chat template included."""
        if self.adapter is not None and (self.adapter.directory / "tokenizer_config.json").is_file():
            return self.adapter
        return self.base


def find_source(spec: ModelSpec, *, with_weights: bool) -> ModelSource:
    """Locate the model and, for an adapter, its base; the files are on this disk afterwards.

    Raises ModelNotFoundError (names the base when that is what is missing) and ModelLoadError.
    """

    def find(model_id: str, revision: str | None) -> ModelFiles:
        return locate(model_id, revision, with_weights=with_weights, with_code=spec.trust_remote_code)

    files = find(spec.model_id, spec.revision)
    if files.gguf_name is not None or not checking.is_adapter(files.directory):
        return ModelSource(spec, files, None)
    base_id, base_revision = base_of(files.directory)
    try:
        base = find(base_id, base_revision)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{spec.model_id} is an adapter on {base_id}, which is missing: {error.what}", error.next_step
        ) from error
    if base.gguf_name is None and checking.is_adapter(base.directory):
        raise ModelLoadError(
            f"{spec.model_id} is an adapter on {base_id}, which is an adapter itself",
            "merge that one into its base, save the result as a full model and train on it",
        )
    return ModelSource(spec, base, files)


def read_config(source: ModelSource) -> PretrainedConfig:
    """The base's configuration; ModelLoadError when it is damaged, unknown or needs untrusted code."""
    from transformers import AutoConfig

    base, trusted = source.base, source.spec.trust_remote_code
    for files in (base, source.adapter):
        if files is not None:
            checking.check_custom_code(files.directory, files.model_id, trusted)
            check_figures(files.directory)
    with explained(base.model_id):
        return AutoConfig.from_pretrained(base.directory, trust_remote_code=trusted, **gguf_argument(base))


def gguf_argument(files: ModelFiles) -> dict[str, str]:
    """The keyword that makes transformers read a GGUF file; empty for any other model."""
    return {} if files.gguf_name is None else {"gguf_file": files.gguf_name}
