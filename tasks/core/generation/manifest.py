"""The manifest of a run: what was run with which settings, and what all its sessions say together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from tasks.core.files import write_atomically
from tasks.core.generation.run_dir import RunDir, Session, read_sessions
from tasks.core.provenance import library_version, library_versions, now
from tasks.core.records import RunIdentity, RunManifest, ShardSummary

if TYPE_CHECKING:
    from tasks.core.generation.likelihood import ReferenceScore
    from tasks.core.generation.published import Published

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
    sessions = sorted((session for part in run.parts() for session in read_sessions(part)), key=_start)
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
        started_at=_start(sessions[0]).isoformat(timespec="seconds") if sessions else now(),
        finished_at=now(),
        generation_seconds=round(seconds_covered(sessions), 3),
        completion_tokens=published.completion_tokens,
        reasoning_tokens=published.reasoning_tokens,
        cut_in_thoughts_count=published.cut_in_thoughts_count,
        prompt_tokens=published.prompt_tokens,
        memory_events=tuple(event for session in sessions for event in session.memory_events),
        peak_memory_bytes=max((session.peak_memory_bytes or 0 for session in sessions), default=None),
        shards=summarize_shards(sessions),
        reference_perplexity=references.perplexity if references else None,
        reference_tokens=references.tokens if references else None,
        references_sha256=references.sha256 if references else None,
        library_versions=library_versions(LIBRARIES),
        device=last.device if last else "unknown",
        tuneproof_version=library_version("tuneproof"),
    )
    write_atomically(run.manifest_path, manifest.model_dump_json(indent=2))
    return manifest


def seconds_covered(sessions: Sequence[Session]) -> float:
    """Return the time during which at least one session ran: shards that work side by side count once."""
    covered = timedelta()
    end: datetime | None = None
    for session in sorted(sessions, key=_start):
        start, stop = _start(session), _start(session) + timedelta(seconds=session.seconds)
        covered += max(timedelta(), stop - (start if end is None else max(start, end)))
        end = stop if end is None else max(end, stop)
    return covered.total_seconds()


def summarize_shards(sessions: Sequence[Session]) -> tuple[ShardSummary, ...]:
    """Sum up what each shard did; sessions that were not of a shard are left out."""
    names = sorted({session.shard for session in sessions if session.shard is not None}, key=_shard_order)
    summaries = []
    for name in names:
        own = [session for session in sessions if session.shard == name]
        summaries.append(
            ShardSummary(
                shard=name,
                rows=sum(session.rows for session in own),
                seconds=round(sum(session.seconds for session in own), 3),
                hosts=tuple(sorted({session.host for session in own if session.host is not None})),
                devices=tuple(sorted({session.device for session in own})),
            )
        )
    return tuple(summaries)


def _shard_order(name: str) -> tuple[int, int]:
    index, _, count = name.partition("-of-")
    return int(count), int(index)


def _start(session: Session) -> datetime:
    return datetime.fromisoformat(session.started_at)
