"""How likely the model finds the reference answers: their negative log-likelihood, and perplexity."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tasks.core.errors import StorageError
from tasks.core.files import replacing, write_atomically
from tasks.core.generation.batching import Request, RequestQueue
from tasks.core.generation.engines.inflight_support import why_unsupported
from tasks.core.generation.engines.rotary import why_rows_depend
from tasks.core.generation.ladder import generate_all
from tasks.core.generation.reference_scorer import ReferenceScorer
from tasks.core.memory.budget import TokenBudget
from tasks.core.prompts.tokens import IGNORED_LABEL
from tasks.core.records import Example, GenerationSettings, Record, RunIdentity
from tasks.core.runs.ledger import ABSENT, ROWS_KEPT, Ledger, Mask, index_ledgers, read_lines
from tasks.core.runs.ledger_lines import DamagedLineError, score_head, score_in
from tasks.core.runs.manifest import REFERENCE_SCORER, ReferenceScore
from tasks.core.runs.progress import GenerationProgress, ProgressMeter
from tasks.core.runs.rows import RunRows
from tasks.core.runs.run_dir import seal_path_of

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel
    from tasks.core.prompts.tokens import PromptBuilder, TrainingRow

logger = logging.getLogger(__name__)

_LARGEST_EXPONENT = 700.0  # beyond, a float cannot hold its exponential


def score_references(
    path: Path,
    rows: RunRows,
    run_key: str,
    *,
    model: LoadedModel,
    prompts: PromptBuilder,
    budget: TokenBudget,
    wanted: Mask | None = None,
    report: Callable[[GenerationProgress], None] | None = None,
) -> ReferenceScore:
    """Write one line {id, tokens, negative_log_likelihood} per reference to `path` and return the total.

    Teacher-forced: each reference token (with the end token that a right answer carries) is scored given the
    prompt and the reference before it; natural logarithm. Rows without a reference are left out; a reference for which
    there is no score has a line {id, error}. Perplexity as in Jelinek et al. 1977, per token of this model's
    tokenizer, so comparable only between models that share it. With `wanted`, a mask by position, only those rows are
    scored. What an interrupted call has scored is kept in a file beside `path`, from which the next call goes on.
    `report` is told how far it is, about once a second.
    """
    partial_path = path.with_suffix(f".partial-{REFERENCE_SCORER}.jsonl")
    with Ledger(partial_path, run_key) as ledger:
        missing = index_ledgers([partial_path], rows.ids, run_key, score_head).offsets == ABSENT
        scored = int((~missing).sum())
        if wanted is not None:
            missing &= wanted

        def tell(progress: GenerationProgress) -> None:
            """Rows without a reference are found one after the other, and taken out of `missing`."""
            if report is not None:
                report(replace(progress, rows_total=scored + int(missing.sum())))

        meter = ProgressMeter(scored + int(missing.sum()), scored, budget, tell)
        packs: bool | None = None
        for chunk in _chunks(rows, prompts, missing):
            packs = _packs(model) if packs is None else packs
            for record in _scored(chunk, rows, model, budget, packs=packs):
                ledger.append_line(record)
                meter.add(record.get("tokens", 0), 1, error="error" in record)
        meter.report_now()
    score = merge_references(path, [partial_path], rows, run_key)
    partial_path.unlink(missing_ok=True)
    if score.failed:
        logger.warning("%d references have no score; the reasons are in %s", score.failed, path)
    return score


def _packs(model: LoadedModel) -> bool:
    """Whether rows may go through the in-flight engine's steps; says so where not."""
    reason = why_unsupported(model, GenerationSettings())
    if reason is not None:
        logger.info("references are scored in padded batches: %s", reason)
    return reason is None


def _scored(
    chunk: list[tuple[Request, int]],
    rows: RunRows,
    model: LoadedModel,
    budget: TokenBudget,
    *,
    packs: bool,
) -> Iterator[dict[str, Any]]:
    requests = {request.position: request for request, _ in chunk}
    answers = {request.position: start for request, start in chunk}
    texts = [request.token_ids for request in requests.values()]
    lengths = list(map(len, texts))
    # What all begin with, without tokens from which one of an answer is predicted.
    prefix = _common_beginning(texts)[: min(answers.values()) - 1]
    queue = RequestQueue(list(requests), lengths, requests.__getitem__, shared_prefix=prefix)
    packs = packs and why_rows_depend(model.model, max(lengths)) is None
    scorer = ReferenceScorer(model, answers, packs=packs)
    for row in generate_all(scorer, queue, budget, device=model.device):
        head = {"id": rows.ids[row.position].decode()}
        if row.finish_reason == "error":
            yield {**head, "error": row.text}
        else:
            tokens = len(requests[row.position].token_ids) - answers[row.position]
            yield {**head, "tokens": tokens, "negative_log_likelihood": scorer.losses.pop(row.position)}


def _common_beginning(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first, last = min(texts), max(texts)  # all others lie between them
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))]


class Seal(Record):
    """Count and digest of a file of reference scores, and of which run it is; beside it."""

    rows: int
    sha256: str
    run_key: str
    scorer: int = 1  # the one that wrote no number


def read_reference_score(
    path: Path, identity: RunIdentity, known_sha256: str | None = None
) -> ReferenceScore | None:
    """Sum up a file that `score_references` wrote; None where it is absent, not whole, or of another run.

    Whole is what has the digest of its seal, or `known_sha256`, which a manifest tells. Scores in 16 bits that
    another version made count as none, since they round otherwise.
    """
    if not path.exists():
        return None
    score, seal = sum_references(path), _read_seal(path)
    if score is None:
        logger.warning("%s is not whole: the references are scored again", path)
    elif score.sha256 == known_sha256:
        return score
    elif seal is None or seal.model_copy(update={"scorer": REFERENCE_SCORER}) != _seal_of(
        score, identity.run_key
    ):
        logger.warning("%s is not whole: the references are scored again", path)
    elif not is_scored_alike(seal.scorer, identity):
        logger.warning("%s is of a version that rounds otherwise: the references are scored again", path)
    else:
        return score
    return None


def is_scored_alike(scorer: int | None, identity: RunIdentity) -> bool:
    """Whether what `scorer` made (None: the first) are the figures of this version."""
    return scorer == REFERENCE_SCORER or identity.model.is_float32


def sum_references(path: Path) -> ReferenceScore | None:
    """Sum up a file of reference scores as it is; None where it is absent or a line is damaged."""
    total, tokens, count, failed = 0.0, 0, 0, 0
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                row = score_in(line)
                if "error" in row:
                    failed += 1
                    continue
                total += row["negative_log_likelihood"]
                tokens += row["tokens"]
                count += 1
    except (FileNotFoundError, DamagedLineError):
        return None
    perplexity = math.exp(min(total / tokens, _LARGEST_EXPONENT)) if tokens else None
    return ReferenceScore(perplexity, tokens, count, failed, digest.hexdigest())


def _seal_of(score: ReferenceScore, run_key: str) -> Seal:
    return Seal(rows=score.rows + score.failed, sha256=score.sha256, run_key=run_key, scorer=REFERENCE_SCORER)


def _read_seal(path: Path) -> Seal | None:
    try:
        return Seal.model_validate_json(seal_path_of(path).read_bytes())
    except (OSError, ValidationError):
        return None


def merge_references(path: Path, parts: Sequence[Path], rows: RunRows, run_key: str) -> ReferenceScore:
    """Join files of scores into `path`, in dataset order, whole or not at all; seal it and return the total."""
    index = index_ledgers(parts, rows.ids, run_key, score_head)
    scored = index.offsets != ABSENT
    with replacing(path, ROWS_KEPT) as partial_path, partial_path.open("wb") as file:
        file.writelines(read_lines(index.only(scored)))
    score = sum_references(path)
    if score is None:
        raise StorageError(
            f"{path} cannot be read as it was written just now",
            "check the disk, then run the same command again: all answers are kept",
        )
    write_atomically(seal_path_of(path), _seal_of(score, run_key).model_dump_json())
    return score


def _chunks(
    rows: RunRows, prompts: PromptBuilder, wanted: Mask, size: int = 4096
) -> Iterator[list[tuple[Request, int]]]:
    """Rows with something to score, and where that begins; others that were wanted are so no longer."""
    chunk: list[tuple[Request, int]] = []
    positions: deque[int] = deque()

    def scorable() -> Iterator[Example]:
        for position, example in enumerate(rows.examples()):
            if not wanted[position]:
                continue
            if example.problem is None and example.reference is not None:
                positions.append(position)
                yield example
            else:
                wanted[position] = False

    for row in prompts.reference_rows(scorable()):
        position = positions.popleft()
        start, end = _answer_span(row)
        if row.problem is None and end > start > 0:
            chunk.append((Request(position, row.id, tuple(row.input_ids[:end]), 0), start))
        else:
            wanted[position] = False
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _answer_span(row: TrainingRow) -> tuple[int, int]:
    """Begin and end of the labelled tokens: the reference."""
    labelled = [place for place, label in enumerate(row.labels) if label != IGNORED_LABEL]
    return (labelled[0], labelled[-1] + 1) if labelled else (0, 0)
