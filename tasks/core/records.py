"""The records that travel between the steps, in the order in which one row meets them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

FinishReason = Literal["stop", "length", "error"]
_LARGEST_ORDER = 2**53  # what every reader of JSON can hold


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool.

    `reasoning` are an assistant's thoughts before `content`; `is_learnt` false keeps the turn out of the loss.
    """

    role: str
    content: str
    reasoning: str | None = None
    is_learnt: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """One dataset row, mapped. `id` is content hash + occurrence, never a position.

    `messages` holds an earlier conversation when the dataset has one, else None.
    `problem` says why the row cannot be asked; it then becomes an error row, never a missing one.
    `reference_reasoning` are the thoughts that lead to `reference`; `other_references` are right answers too.
    `is_reference_learnt` false keeps the answer out of the loss, as a turn's `is_learnt` does.
    """

    id: str
    question: str
    system: str | None = None
    reference: str | None = None
    messages: tuple[Message, ...] | None = None
    problem: str | None = None
    reference_reasoning: str | None = None
    other_references: tuple[str, ...] = ()
    is_reference_learnt: bool = True

    @property
    def earlier_turns(self) -> tuple[Message, ...]:
        """What came before the question, without the system prompt; none where a single question is asked."""
        return tuple(message for message in (self.messages or ())[:-1] if message.role != "system")

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages to answer: system (if any), earlier turns, the question."""
        if self.messages is not None:
            return self.messages
        system = () if self.system is None else (Message("system", self.system),)
        return (*system, Message("user", self.question))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt. `truncated_tokens` were cut from the left of the user's text."""

    id: str
    token_ids: tuple[int, ...]
    truncated_tokens: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model answered to one prompt; `error` set means that `text` is empty.

    `reasoning` are its thoughts, which `text` is without; `reasoning_tokens` of the `completion_tokens` were spent
    on them, markers included. `is_cut_in_thoughts`: they never ended, so there is no answer.
    """

    id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    batch_size: int
    truncated_tokens: int = 0
    error: str | None = None
    reasoning: str | None = None
    reasoning_tokens: int = 0
    is_cut_in_thoughts: bool = False


class Record(BaseModel):
    """Base of what is written to files: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class GenerationSettings(Record):
    """Everything that shapes an answer once prompt and weights are given.

    `others` are settings that came later, by name, where they are not at their default: a run without them has the
    run key that it had before there were any.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: bool = False
    stop_strings: tuple[str, ...] = ()
    seed: int = 42
    thought_markers: tuple[str, ...] | None = Field(
        None,
        description="opening and closing markers in turn; empty: thoughts stay in the answer; None: the model's",
    )
    others: dict[str, Any] = Field({}, exclude_if=lambda others: not others)

    def values(self) -> dict[str, Any]:
        """All settings by name, as JSON has them."""
        return {**self.model_dump(mode="json", exclude={"others"}), **self.others}


class ModelIdentity(Record):
    """Which weights answer, exactly. Two equal identities give equal float32 greedy answers."""

    model_id: str
    revision: str | None = None
    weights_sha256: str
    base_model_id: str | None = None
    adapter_id: str | None = None
    adapter_sha256: str | None = None
    quantization: Literal["none", "4bit", "8bit"] = "none"
    dtype: str
    chat_template_sha256: str
    vocab_size: int
    unties_embeddings: bool = False
    """Whether the adapter changes one end of a base whose embedding and head are one matrix."""
    template_end: str | None = Field(
        None,
        description="token that ends answers by the chat template alone, not by the model's configuration",
    )
    thought_markers: tuple[str, ...] = Field(
        (), description="what template or tokenizer put around thoughts: opening and closing in turn"
    )

    @property
    def is_float32(self) -> bool:
        """Whether all is computed in 32 bits, where another order of summing changes no figure that anybody reads."""
        return self.dtype == "float32" and self.quantization == "none"

    def content(self) -> dict[str, Any]:
        """The parts that can change an answer: digests, not the names or places they came from."""
        untied = {"tied embeddings": "kept apart"} if self.unties_embeddings else {}
        return {
            **untied,
            "weights": self.weights_sha256,
            "adapter": self.adapter_sha256,
            "quantization": self.quantization,
            "dtype": self.dtype,
            "chat template": self.chat_template_sha256,
            **({} if self.template_end is None else {"end of an answer": self.template_end}),
        }


class MemoryEvent(Record):
    """One step of the memory ladder, as logged and as sessions and manifest keep it."""

    model_config = ConfigDict(extra="ignore")  # a file of another version tells what it can

    kind: str = Field("", description="out_of_memory, grow, pin, row_failed or process_died")
    rows: int = 0
    tokens: int = 0
    limit_tokens: int = 0
    limit_rows: int = Field(0, description="of a training: rows at once afterwards")
    message: str = ""

    @property
    def ran_out(self) -> bool:
        """Whether memory ran out, rather than that something followed from it."""
        return self.kind in ("out_of_memory", "process_died")


class SettingDifference(NamedTuple):
    """A setting that differs between two runs; as text `name: mine -> theirs`."""

    name: str
    mine: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.mine} -> {self.theirs}"


class RunIdentity(Record):
    """Everything that can change a published answer; batch size, shards and machine are not in it."""

    model: ModelIdentity
    rows_sha256: str
    row_count: int
    generation: GenerationSettings
    max_sequence_length: int
    long_prompts: str
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of the chat template, as set")

    def content(self) -> dict[str, Any]:
        """Flat name -> value of all that enters the run key; names are those a person reads."""
        generation = self.generation.values()
        if self.generation.thought_markers is None:  # a run of a model without thoughts keeps the key it had
            del generation["thought_markers"]
        declared = self.generation.thought_markers is None and self.model.thought_markers
        return {
            **self.model.content(),
            **({"thoughts": list(self.model.thought_markers)} if declared else {}),
            "rows": self.rows_sha256,
            "max_sequence_length": self.max_sequence_length,
            "long_prompts": self.long_prompts,
            **generation,
            **({"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}),
        }

    @property
    def run_key(self) -> str:
        """sha256 (hex, 64 characters) over the sorted content."""
        lines = (f"{name}={value!r}" for name, value in sorted(self.content().items()))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def differences(self, other: RunIdentity) -> list[SettingDifference]:
        """The settings that differ."""
        mine, theirs = self.content(), other.content()
        return [
            SettingDifference(name, mine.get(name), theirs.get(name))
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name)
        ]


class PredictionMetadata(Record):
    """How one answer came about; see docs/read-the-outputs.md for each field."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_id: str | None = None
    model_revision: str | None = None
    inference_time: float | None = Field(None, description="seconds the row spent in its batch")
    token_count: int | None = Field(None, description="completion tokens, those of the thoughts included")
    reasoning_tokens: int = Field(0, description="completion tokens up to the end of the thoughts")
    is_cut_in_thoughts: bool = Field(False, description="the thoughts never ended, so there is no answer")
    prompt_tokens: int | None = None
    truncated_prompt_tokens: int = 0
    finish_reason: str | None = None
    batch_size: int | None = None
    generation_config: dict[str, Any] = {}


class Prediction(Record):
    """One line of `inferencer_output.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    id: str
    question: str
    system_prompt: str | None = None
    predicted_answer: str = ""
    ground_truth: str | None = None
    other_ground_truths: tuple[str, ...] = Field((), description="right answers beside ground_truth")
    error: str | None = None
    reasoning: str | None = Field(None, description="the model's thoughts, which predicted_answer is without")
    earlier_turns: tuple[Message, ...] = Field((), description="of a conversation, before the question")
    metadata: PredictionMetadata = PredictionMetadata()

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers, the first one first; none where there is no reference."""
        return () if self.ground_truth is None else (self.ground_truth, *self.other_ground_truths)


class ShardSummary(Record):
    """What one shard did, over all its sessions."""

    shard: str = Field(
        description="its number and the number of all, e.g. 0-of-4; run: rows answered unsplit"
    )
    rows: int
    seconds: float
    hosts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


class RunManifest(Record):
    """`runs/<run>/manifest.json`: written last, so its presence means the predictions are whole."""

    format: Literal[1] = 1
    run_name: str
    run_key: str
    identity: RunIdentity
    predictions_path: str
    predictions_sha256: str
    row_count: int
    error_count: int
    truncated_prompt_count: int = 0
    dataset_id: str
    dataset_split: str | None = None
    dataset_revision: str | None = None
    engine: str
    engine_reason: str | None = None
    started_at: str
    finished_at: str
    order: int | None = Field(
        None,
        description="larger than that of every run before: milliseconds since 1970 unless a clock went back",
    )
    generation_seconds: float = Field(description="time during which rows were generated, shards overlapping")
    untimed_row_count: int = Field(
        0,
        description="rows of sessions that were killed before they wrote down their time; speed is unknown then",
    )
    completion_tokens: int
    reasoning_tokens: int = Field(0, description="completion tokens that were spent on thoughts")
    cut_in_thoughts_count: int = 0
    prompt_tokens: int
    memory_events: tuple[MemoryEvent, ...] = ()
    peak_memory_bytes: int | None = None
    shards: tuple[ShardSummary, ...] = Field((), description="none when the run was not split")
    reference_perplexity: float | None = Field(
        None, description="exp(mean negative log-likelihood per reference token), lower is better"
    )
    reference_tokens: int | None = None
    references_sha256: str | None = Field(None, description="digest of `reference_likelihoods.jsonl`")
    reference_scorer: int | None = Field(
        None,
        description="the way in which references were scored; two ways round otherwise unless all is float32",
    )
    library_versions: dict[str, str] = {}
    device: str
    tuneproof_version: str

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens per second of generation; None where not all of its time is known."""
        if self.generation_seconds <= 0 or self.untimed_row_count:
            return None
        return self.completion_tokens / self.generation_seconds

    @property
    def finish_order(self) -> int:
        """The larger, the later it was finished."""
        return finish_order(self.order, self.finished_at)


def finish_order(order: object, finished_at: str) -> int:
    """Return a run's place in the order of finishing; of one without a number, by its clock, 0 where none reads it."""
    if isinstance(order, int) and 0 <= order <= _LARGEST_ORDER:
        return order
    try:
        moment = datetime.fromisoformat(finished_at)
    except ValueError:
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


class LossPoint(Record):
    """One logged training step; `validation_loss` is set where validation ran."""

    step: int
    epoch: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None


class TrainingRestart(Record):
    """A group of training processes was begun again, from the newest whole checkpoint."""

    model_config = ConfigDict(extra="ignore")

    cause: str = Field("", description="signal or exit code of the process that ended first, or what it said")
    rank: int | None = Field(None, description="which process of the group")
    step: int = Field(0, description="the update of the checkpoint that it went on from; 0 = from the start")


class ModelManifest(Record):
    """`models/<run>/tuneproof_manifest.json`: written last, so its presence means a whole model."""

    format: Literal[1] = 1
    run_name: str
    kind: Literal["adapter", "full"]
    base_model_id: str
    base_model_revision: str | None = None
    base_weights_sha256: str
    chat_template_sha256: str
    training_data_id: str
    training_rows_sha256: str
    training_dataset_sha256: str | None = Field(
        None, description="over the ids of all rows, those too that were skipped; none in older models"
    )
    training_row_count: int
    skipped_row_count: int = 0
    truncated_row_count: int = 0
    earlier_answer_row_count: int = Field(
        0,
        description="more rows, for answers in conversations that are not learnt in the row of the last answer",
    )
    unlearnt_answer_count: int = Field(0, description="answers in conversations that did not fit")
    thinking_row_count: int = Field(0, description="rows whose thoughts are learnt")
    thoughts: Literal["open", "closed"] | None = Field(
        None, description="whether the prompt lets the model think; none = its template knows no thoughts"
    )
    validation_data_id: str | None = None
    settings: dict[str, Any]
    losses: tuple[LossPoint, ...]
    final_loss: float | None
    final_validation_loss: float | None = None
    best_step: int | None = Field(
        None, description="update whose weights these are; none: those of the last one"
    )
    best_validation_loss: float | None = None
    steps: int
    planned_steps: int | None = None
    stopped_early: bool = Field(False, description="early stopping ended the training after `steps` updates")
    trained_tokens: int
    seconds: float
    processes: int = Field(1, description="processes that shared the rows of an update")
    strategy: Literal["one", "ddp", "fsdp"] = Field(
        "one",
        description="what they shared besides: nothing (ddp), or weights, gradients and optimizer (fsdp)",
    )
    memory_events: tuple[MemoryEvent, ...] = ()
    restarts: tuple[TrainingRestart, ...] = ()
    started_at: str
    finished_at: str
    ordered_at: str | None = Field(
        None,
        description="finished_at, but later than that of each model that was there, whatever the clock did",
    )
    weights_sha256: str | None = Field(
        None, description="digest of weights, tokenizer and configuration as the training left them"
    )
    library_versions: dict[str, str] = {}
    device: str
    tuneproof_version: str

    @model_validator(mode="before")
    @classmethod
    def _memory_events_of_older_models(cls, values: Any) -> Any:
        """They were among the settings once, in a shape of their own."""
        settings = values.get("settings") if isinstance(values, dict) else None
        old = settings.get("memory_events") if isinstance(settings, dict) else None
        if not isinstance(old, list) or "memory_events" in values:
            return values
        events = [
            MemoryEvent(
                kind="out_of_memory",
                rows=event.get("rows_at_once", 0),
                limit_rows=event.get("next_rows_at_once", 0),
                message=event.get("message", ""),
            )
            for event in old
            if isinstance(event, dict)
        ]
        return {**values, "memory_events": events}
