"""Generation and reference scores in this process, for a whole run or one shard of it."""

from __future__ import annotations

import logging
import multiprocessing
from typing import TYPE_CHECKING

from tasks.core.errors import EvaluationError
from tasks.core.generation import likelihood
from tasks.core.generation.answering import answer_missing, index_run, missing_mask, remember_budget
from tasks.core.generation.engines.choosing import choose_engine
from tasks.core.generation.runners.isolation import ChildDiedError
from tasks.core.interruption import is_interrupted, raise_if_interrupted
from tasks.core.prompts.answer_reading import AnswerReader
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.shards import Shard, all_shards

if TYPE_CHECKING:
    from tasks.core.records import RunManifest
    from tasks.inferencer import Inferencer, PreparedRows

logger = logging.getLogger(__name__)


def answer_here(inferencer: Inferencer, prepared: PreparedRows, shard: Shard | None = None) -> LedgerIndex:
    """Answer what is missing with the model in this process; the caller holds the lock."""
    model, settings = inferencer.load_model_and_tokenizer(), inferencer.generation_settings()
    budget = inferencer.token_budget()
    with prepared.sync.sending(prepared.run if shard is None else prepared.run.shard(shard)):
        choice = choose_engine(
            inferencer.settings.engine,
            model,
            settings,
            longest_tokens=inferencer.settings.max_sequence_length,
        )
        inferencer.engine_name = choice.engine.name
        index = answer_missing(
            prepared.run,
            prepared.rows,
            prompts=inferencer.prompt_builder(),
            choice=choice,
            budget=budget,
            settings=settings,
            device=model.device,
            report=inferencer.on_progress,
            shard=shard,
            reader=AnswerReader(model.tokenizer, settings.thought_markers, settings.stop_strings),
        )
    remember_budget(model, budget, inferencer.budget_store)
    return index


def answer_shard(inferencer: Inferencer, prepared: PreparedRows, shard: Shard) -> None:
    """Answer one shard and score its references, under its lock; in a child when `generates_in_child`."""
    # A worker of a cluster may be one that Python lets have no children.
    if inferencer.generates_in_child and not multiprocessing.current_process().daemon:
        from tasks.isolated_inference import generate_in_child

        try:
            generate_in_child(inferencer, prepared, shard, stopped=is_interrupted)
        except ChildDiedError:
            raise_if_interrupted()  # then it was ended from here, and is not to be begun again
            raise
        return
    with prepared.run.shard(shard).locked():
        if missing_mask(prepared.run, prepared.rows, shard).any():
            answer_here(inferencer, prepared, shard)
        inferencer.score_references(prepared, shard)
        prepared.sync.push_part(prepared.run.shard(shard))


def score_references(
    inferencer: Inferencer, prepared: PreparedRows, shard: Shard | None = None
) -> likelihood.ReferenceScore | None:
    """Measure, read, or join from all shards, the perplexity of the references; None when it is not asked for.

    Rows that ended in an error are left out: what made generation fail, a crash even, would come again.
    """
    if not inferencer.settings.score_references:
        return None
    run = prepared.run
    path = run.references_path if shard is None else run.shard_references_path(shard)
    known = _published_digest(run) if shard is None else None
    found = likelihood.read_reference_score(path, run.run_key, known)
    if found is not None and (shard is not None or _is_as_published(run, found)):
        return found
    measured = [run.shard_references_path(one) for one in all_shards(inferencer.settings.num_shards)]
    if shard is None and all(
        likelihood.read_reference_score(file, run.run_key) is not None for file in measured
    ):
        return likelihood.merge_references(path, measured, prepared.rows, run.run_key)
    answered = ~index_run(run, prepared.rows).failed
    return likelihood.score_references(
        path,
        prepared.rows,
        run.run_key,
        model=inferencer.load_model_and_tokenizer(),
        prompts=inferencer.prompt_builder(),
        budget=inferencer.token_budget(),
        wanted=answered if shard is None else answered & shard.mask(prepared.rows.ids),
    )


def has_references(run: RunDir, manifest: RunManifest) -> bool:
    """Whether the references of a finished run were scored, and the file is still what the manifest says."""
    found = likelihood.sum_references(run.references_path)
    if found is None or manifest.reference_tokens != found.tokens:
        return False
    return manifest.references_sha256 in (None, found.sha256)  # earlier versions kept no digest


def _published_digest(run: RunDir) -> str | None:
    try:
        return run.read_manifest().references_sha256
    except EvaluationError:
        return None


def _is_as_published(run: RunDir, found: likelihood.ReferenceScore) -> bool:
    """Whether a manifest, if there is one, knows these reference scores.

    Where it knows others it is taken away, and the scores with it: the run is unfinished again.
    """
    try:
        manifest = run.read_manifest()
    except EvaluationError:
        return True
    if manifest.references_sha256 in (None, found.sha256):
        return True
    logger.warning("%s is not what was published: the references are scored again", run.references_path)
    run.manifest_path.unlink(missing_ok=True)
    run.references_path.unlink(missing_ok=True)
    return False
