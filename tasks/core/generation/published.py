"""The published file: every row once, in dataset order, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tasks.core.errors import DataError, LedgerCorruptError
from tasks.core.files import flush_to_disk
from tasks.core.generation.ledger import LedgerIndex, read_completions, storage_error
from tasks.core.generation.rows import RunRows
from tasks.core.generation.run_dir import RunDir
from tasks.core.records import (
    Completion,
    Example,
    GenerationSettings,
    ModelIdentity,
    Prediction,
    PredictionMetadata,
)


@dataclass(frozen=True, slots=True)
class Published:
    """What was written: digest of the file and sums over its rows."""

    sha256: str
    row_count: int
    error_count: int
    truncated_prompt_count: int
    completion_tokens: int
    prompt_tokens: int


def publish(
    run: RunDir,
    rows: RunRows,
    index: LedgerIndex,
    *,
    model: ModelIdentity,
    settings: GenerationSettings,
) -> Published:
    """Join rows and ledgers in dataset order into `inferencer_output.jsonl`, with constant memory.

    Raises LedgerCorruptError when a row is missing, StorageError when the file cannot be written; an earlier
    published file stays until the new one is whole.
    """
    missing = len(rows) - index.finished
    if missing:
        raise LedgerCorruptError(
            f"the ledgers in {run.path} lack {missing} of {len(rows)} rows",
            "run the same command again to answer them; if shards run on other machines, let all of them "
            "share the run directory, or set pipeline.runs_dir to a URL",
        )
    scratch_path = run.predictions_path.with_suffix(".jsonl.tmp")
    config = settings.model_dump(mode="json", exclude_none=True)
    digest = hashlib.sha256()
    count = errors = truncated = completion_tokens = prompt_tokens = 0
    try:
        with scratch_path.open("wb") as file:
            for example, completion in zip(rows.examples(), read_completions(index), strict=True):
                line = orjson.dumps(
                    _prediction(example, completion, model, config), option=orjson.OPT_APPEND_NEWLINE
                )
                file.write(line)
                digest.update(line)
                count += 1
                errors += completion.error is not None
                truncated += completion.truncated_tokens > 0
                completion_tokens += completion.completion_tokens
                prompt_tokens += completion.prompt_tokens
            file.flush()
            os.fsync(file.fileno())
        scratch_path.replace(run.predictions_path)
        flush_to_disk(run.path)
    except OSError as exc:
        scratch_path.unlink(missing_ok=True)
        raise storage_error(exc, scratch_path) from exc
    return Published(digest.hexdigest(), count, errors, truncated, completion_tokens, prompt_tokens)


def _prediction(
    example: Example, completion: Completion, model: ModelIdentity, config: dict[str, Any]
) -> dict[str, Any]:
    earlier = [{"role": turn.role, "content": turn.content} for turn in example.earlier_turns]
    return {
        "id": example.id,
        **({"earlier_turns": earlier} if earlier else {}),
        "question": example.question,
        "system_prompt": example.system,
        "predicted_answer": completion.text,
        "ground_truth": example.reference,
        "error": completion.error,
        "metadata": {
            "model_id": model.model_id,
            "model_revision": model.revision,
            "inference_time": completion.seconds,
            "token_count": completion.completion_tokens,
            "prompt_tokens": completion.prompt_tokens,
            "truncated_prompt_tokens": completion.truncated_tokens,
            "finish_reason": completion.finish_reason,
            "batch_size": completion.batch_size,
            "generation_config": config,
        },
    }


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield the predictions of a published file, or of one with the original pipeline's columns.

    Raises DataError naming the line that is no prediction.
    """
    try:
        with path.open("rb") as file:
            occurrences: dict[str, int] = {}
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, path, number, occurrences)
    except FileNotFoundError as exc:
        raise DataError(f"{path} does not exist", "run `tuneproof infer` first, or check the path") from exc


def _parse(line: bytes, path: Path, number: int, occurrences: dict[str, int]) -> Prediction:
    try:
        row = orjson.loads(line)
        if "predicted_answer" in row:
            return Prediction.model_validate(row)
        return _from_original(row, occurrences)
    except (ValueError, KeyError, TypeError) as exc:
        reason = str(exc).split("\n")[0]
        raise DataError(
            f"{path}: line {number} is not a prediction: {reason}",
            "each line needs question and predicted_answer, or user_prompt and assistant_response",
        ) from exc


def _from_original(row: dict[str, Any], occurrences: dict[str, int]) -> Prediction:
    """Read system_prompt/user_prompt/assistant_response/ground_truth; the id is made from the content."""
    question, answer = row["user_prompt"], row["assistant_response"]
    system, truth = row.get("system_prompt"), row.get("ground_truth")
    content = hashlib.sha256(orjson.dumps([question, system, truth])).hexdigest()[:16]
    occurrence = occurrences.get(content, 0)
    occurrences[content] = occurrence + 1
    return Prediction(
        id=f"{content}-{occurrence}",
        question=question,
        system_prompt=system,
        predicted_answer=answer,
        ground_truth=truth,
        metadata=PredictionMetadata(),
    )
