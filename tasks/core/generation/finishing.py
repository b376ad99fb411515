"""What follows the answers of a run: reference scores, the published file, the manifest."""

from __future__ import annotations

import logging
from dataclasses import replace

from tasks.core.data.sources import described_data
from tasks.core.errors import EvaluationError
from tasks.core.generation import likelihood
from tasks.core.generation.answering import index_run
from tasks.core.generation.plan import Answerer, RunPlan
from tasks.core.records import RunManifest
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.manifest import ReferenceScore, write_manifest
from tasks.core.runs.published import publish
from tasks.core.runs.run_dir import RunDir
from tasks.core.runs.shards import Shard, all_shards

logger = logging.getLogger(__name__)


def score_references(plan: RunPlan, answerer: Answerer, shard: Shard | None = None) -> ReferenceScore | None:
    """Measure, read, or join from all shards, the perplexity of the references; None when it is not asked for.

    Rows that ended in an error are left out: what made generation fail, a crash even, would come again.
    """
    if not plan.config.inferencer.score_references:
        return None
    run, path = plan.run, replace(plan, part=shard).references_path
    known = _published_digest(run) if shard is None else None
    found = likelihood.read_reference_score(path, plan.identity, known)
    if found is not None and (shard is not None or _is_as_published(run, found)):
        return found
    measured = [run.shard_references_path(one) for one in all_shards(plan.config.inferencer.num_shards)]
    if shard is None and all(
        likelihood.read_reference_score(file, plan.identity) is not None for file in measured
    ):
        return likelihood.merge_references(path, measured, plan.rows, run.run_key)
    answered = ~index_run(run, plan.rows).failed
    return likelihood.score_references(
        path,
        plan.rows,
        run.run_key,
        model=answerer.load_model_and_tokenizer(),
        prompts=answerer.prompt_builder(),
        budget=answerer.token_budget(),
        wanted=answered if shard is None else answered & shard.mask(plan.rows.ids),
        report=answerer.on_reference_progress if shard is None else None,
    )


def publish_run(plan: RunPlan, answerer: Answerer, index: LedgerIndex) -> RunManifest:
    """Write the predictions in dataset order, then the manifest. Raises StorageError."""
    settings = plan.config.inferencer
    with plan.locked():
        published = publish(
            plan.run, plan.rows, index, model=plan.identity.model, settings=plan.identity.generation
        )
        references = answerer.score_references(plan)
        manifest = write_manifest(
            plan.run,
            plan.identity,
            published,
            run_name=plan.run_name,
            dataset_id=described_data(settings.required_testing_data_id),
            dataset_split=settings.testing_data_split,
            dataset_revision=settings.testing_data_revision,
            references=references,
        )
        plan.sync.push_published()
        return manifest


def finished_manifest(plan: RunPlan) -> RunManifest | None:
    """Return the manifest when all of a plan was done before and the files are untouched, else None.

    References that are wanted and were not scored make a run unfinished; its answers stay.
    """
    manifest = plan.run.finished_manifest_of(plan.identity.run_key)
    if manifest is None or not plan.config.inferencer.score_references:
        return manifest
    return manifest if _has_references(plan.run, manifest) else None


def _has_references(run: RunDir, manifest: RunManifest) -> bool:
    """Whether the references of a finished run were scored as now, and the file is still what the manifest says."""
    if not likelihood.is_scored_alike(manifest.reference_scorer, manifest.identity):
        return False
    found = likelihood.sum_references(run.references_path)
    if found is None or manifest.reference_tokens != found.tokens:
        return False
    return manifest.references_sha256 in (None, found.sha256)  # earlier versions kept no digest


def _published_digest(run: RunDir) -> str | None:
    try:
        manifest = run.read_manifest()
    except EvaluationError:
        return None
    alike = likelihood.is_scored_alike(manifest.reference_scorer, manifest.identity)
    return manifest.references_sha256 if alike else None


def _is_as_published(run: RunDir, found: ReferenceScore) -> bool:
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
