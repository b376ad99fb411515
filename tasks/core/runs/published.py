"""The published file: every row once, in dataset order, written whole or not at all."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from tasks.core.data.cell_texts import reference_texts
from tasks.core.data.formats.json_texts import read_json
from tasks.core.errors import DataError, LedgerCorruptError, NoAnswerError
from tasks.core.files import replacing
from tasks.core.records import (
    Completion,
    Example,
    GenerationSettings,
    ModelIdentity,
    Prediction,
    RunManifest,
)
from tasks.core.runs.ledger import ROWS_KEPT, LedgerIndex, read_completions
from tasks.core.runs.rows import RunRows
from tasks.core.runs.run_dir import RunDir

_ORIGINAL_NAMES = {"question": "user_prompt", "predicted_answer": "assistant_response"}
# Where other programs put the thoughts that they keep apart.
_REASONING_NAMES = ("reasoning", "reasoning_content", "thinking")
_TEXTS = ("id", "question", "system_prompt", "predicted_answer")


@dataclass(frozen=True, slots=True)
class Published:
    """What was written: digest of the file and sums over its rows."""

    sha256: str
    row_count: int
    error_count: int
    truncated_prompt_count: int
    completion_tokens: int
    reasoning_tokens: int
    cut_in_thoughts_count: int
    prompt_tokens: int
    rows_by_ledger: Mapping[Path, int]


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
    config = {name: value for name, value in settings.values().items() if value is not None}
    digest = hashlib.sha256()
    count = errors = truncated = completion_tokens = reasoning_tokens = cut_in_thoughts = prompt_tokens = 0
    with replacing(run.predictions_path, ROWS_KEPT) as partial_path, partial_path.open("wb") as file:
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
            reasoning_tokens += completion.reasoning_tokens
            cut_in_thoughts += completion.is_cut_in_thoughts
            prompt_tokens += completion.prompt_tokens
    return Published(
        digest.hexdigest(),
        count,
        errors,
        truncated,
        completion_tokens,
        reasoning_tokens,
        cut_in_thoughts,
        prompt_tokens,
        index.rows_by_ledger(),
    )


def _prediction(
    example: Example, completion: Completion, model: ModelIdentity, config: dict[str, Any]
) -> dict[str, Any]:
    earlier = [{"role": turn.role, "content": turn.content} for turn in example.earlier_turns]
    thoughts: dict[str, Any] = {}
    if completion.reasoning_tokens or completion.reasoning is not None or completion.is_cut_in_thoughts:
        thoughts["reasoning_tokens"] = completion.reasoning_tokens
        thoughts["is_cut_in_thoughts"] = completion.is_cut_in_thoughts
    return {
        "id": example.id,
        **({"earlier_turns": earlier} if earlier else {}),
        "question": example.question,
        "system_prompt": example.system,
        "predicted_answer": completion.text,
        **({} if completion.reasoning is None else {"reasoning": completion.reasoning}),
        "ground_truth": example.reference,
        **({"other_ground_truths": example.other_references} if example.other_references else {}),
        "error": completion.error,
        "metadata": {
            "model_id": model.model_id,
            "model_revision": model.revision,
            "inference_time": completion.seconds,
            "token_count": completion.completion_tokens,
            **thoughts,
            "prompt_tokens": completion.prompt_tokens,
            "truncated_prompt_tokens": completion.truncated_tokens,
            "finish_reason": completion.finish_reason,
            "batch_size": completion.batch_size,
            "generation_config": config,
        },
    }


def refuse_without_answers(path: Path, manifest: RunManifest) -> None:
    """Raise NoAnswerError when every row of a published file ended in an error, with the commonest of them."""
    if not manifest.row_count or manifest.error_count < manifest.row_count:
        return
    reasons = Counter(prediction.error for prediction in read_predictions(path))
    (reason, count), others = reasons.most_common(1)[0], len(reasons) - 1
    often = "" if not others else f" ({count} times, beside {others} other errors)"
    raise NoAnswerError(
        f"all {manifest.row_count} rows of {manifest.run_name} ended in an error{often}: {reason}",
        f"the errors are in {path}; mend their cause, then delete {path.parent} or take another run name",
    )


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
        return Prediction.model_validate(_completed(read_json(line), occurrences))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise _no_prediction(path, number, problem) from exc
    except (ValueError, TypeError) as exc:
        raise _no_prediction(path, number, str(exc)) from exc


def _no_prediction(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        f"{path}: line {number} is not a prediction: {problem}",
        "each line needs question and predicted_answer, or user_prompt and assistant_response",
    )


def _completed(row: Any, occurrences: dict[str, int]) -> dict[str, Any]:
    """Our names for the original pipeline's columns, texts for numbers, and an id made from the content.

    Raises ValueError when there is no question or no answer.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is no object but {str(row)[:40]}")
    for name, original in _ORIGINAL_NAMES.items():
        if name not in row:
            if original not in row:
                raise ValueError(f"it has neither {name} nor {original}")
            row[name] = row[original]
    row |= {name: _as_text(row[name]) for name in _TEXTS if name in row}
    row["predicted_answer"] = row["predicted_answer"] or ""
    thoughts = (row.get(name) for name in _REASONING_NAMES)
    row["reasoning"] = next((text for text in thoughts if isinstance(text, str) and text.strip()), None)
    if "ground_truth" in row:
        row |= _references(row)
    if row.get("id") is None:
        row["id"] = _content_id(row, occurrences)
    return row


def _references(row: dict[str, Any]) -> dict[str, Any]:
    """The first right answer and the others, whether they are a list or beside one another."""
    others = row.get("other_ground_truths") or []
    texts = (
        *reference_texts(row["ground_truth"]),
        *(reference_texts(others) if isinstance(others, list) else ()),
    )
    first, *rest = dict.fromkeys(texts) or [None]
    return {"ground_truth": first, "other_ground_truths": rest}


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float | Decimal) else value


def _content_id(row: dict[str, Any], occurrences: dict[str, int]) -> str:
    content = [row["question"], row.get("system_prompt"), row.get("ground_truth")]
    if others := row.get("other_ground_truths"):
        content.append(others)
    digest = hashlib.sha256(orjson.dumps(content)).hexdigest()[:16]
    occurrence = occurrences.get(digest, 0)
    occurrences[digest] = occurrence + 1
    return f"{digest}-{occurrence}"
