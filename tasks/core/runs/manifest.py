"""The manifest of a run: what was run with which settings, and what all its sessions say together."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from tasks.core.files import write_atomically
from tasks.core.own_digest import with_own_digest
from tasks.core.provenance import library_version, library_versions, now
from tasks.core.records import RunIdentity, RunManifest, finish_order
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.work_done import WorkDone

if TYPE_CHECKING:
    from tasks.core.runs.published import Published

REFERENCE_SCORER = 2
"""How references are scored; one more wherever a change lets figures in 16 bits round otherwise."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets", "prefect")


def write_manifest(
    run: RunDir,
    identity: RunIdentity,
    published: Published,
    *,
    run_name: str,
    dataset_id: str,
    dataset_split: str | None,
    dataset_revision: str | None,
    references: ReferenceScore | None,
) -> RunManifest:
    """Write `manifest.json`, the last step of a run, from the published file and the sessions of all shards."""
    work = WorkDone.of(run, published.rows_by_ledger)
    sessions = work.sessions
    # A session whose process died before a row was done tells how memory went, not what answered.
    last = next(reversed([session for session in sessions if session.rows] or sessions), None)
    manifest = RunManifest(
        run_name=run_name,
        run_key=identity.run_key,
        identity=identity,
        predictions_path=run.predictions_path.name,
        predictions_sha256=published.sha256,
        row_count=published.row_count,
        error_count=published.error_count,
        truncated_prompt_count=published.truncated_prompt_count,
        dataset_id=dataset_id,
        dataset_split=dataset_split,
        dataset_revision=dataset_revision,
        engine=last.engine if last else "unknown",
        engine_reason=last.engine_reason if last else None,
        started_at=sessions[0].started.isoformat(timespec="seconds") if sessions else now(),
        finished_at=now(),
        order=next_order(run.path.parent),
        generation_seconds=round(work.seconds, 3),
        untimed_row_count=work.untimed_rows,
        completion_tokens=published.completion_tokens,
        reasoning_tokens=published.reasoning_tokens,
        cut_in_thoughts_count=published.cut_in_thoughts_count,
        prompt_tokens=published.prompt_tokens,
        memory_events=tuple(event for session in sessions for event in session.memory_events),
        peak_memory_bytes=max((session.peak_memory_bytes or 0 for session in sessions), default=None),
        shards=work.shards(),
        reference_perplexity=references.perplexity if references else None,
        reference_tokens=references.tokens if references else None,
        references_sha256=references.sha256 if references else None,
        reference_scorer=REFERENCE_SCORER if references else None,
        library_versions=library_versions(LIBRARIES),
        device=last.device if last else "unknown",
        tuneproof_version=library_version("tuneproof"),
    )
    content = with_own_digest(manifest.model_dump(mode="json"))
    write_atomically(run.manifest_path, json.dumps(content, indent=2, ensure_ascii=False))
    return manifest


def next_order(runs_dir: Path) -> int:
    """Return a number that is larger than that of every run under `runs_dir`: the time, or one more than theirs.

    It is the time in milliseconds since 1970, so that machines that do not see each other's runs agree too; where
    a clock was set back, it goes on from the largest one there is.
    """
    largest = 0
    for path in runs_dir.glob("*/manifest.json"):
        try:
            manifest = orjson.loads(path.read_bytes())
            largest = max(largest, finish_order(manifest.get("order"), str(manifest.get("finished_at"))))
        except (
            OSError,
            ValueError,
            AttributeError,
        ):  # what cannot be read is no run that could be the newest
            continue
    return max(time.time_ns() // 1_000_000, largest + 1)


@dataclass(frozen=True, slots=True)
class ReferenceScore:
    """exp(total negative log-likelihood / tokens) over all `rows` references that have a score, and the file's digest.

    `failed` references have none: the model gave no number for them, or memory ran out.
    """

    perplexity: float | None
    tokens: int
    rows: int
    failed: int
    sha256: str
