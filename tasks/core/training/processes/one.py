"""The training of a work in this process, alone or as one of a group: fit, then publish."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained import registry
from tasks.core.provenance import library_version, library_versions, now
from tasks.core.records import ModelManifest
from tasks.core.training import checkpoints
from tasks.core.training.job import Fitted
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.team import ALONE, Team
from tasks.core.training.processes.work import Report, TrainingWork

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


class One:
    """Trains in this process; nothing is started."""

    sends_checkpoints: ClassVar[bool] = False

    def train(self, work: TrainingWork, report: Report | None = None) -> ModelManifest:
        """See `Trainers`."""
        manifest = train_here(work, ALONE, report)
        assert manifest is not None
        return manifest

    def dismiss(self) -> None:
        """Nobody waits."""


def train_here(
    work: TrainingWork, team: Team, report: Report | None = None, journal: Journal | None = None
) -> ModelManifest | None:
    """Train as one of `team`. The first publishes: weights, tokenizer and card first, the manifest last.

    Returns the manifest, None in the other processes. `journal` has what became of a group's earlier tries.
    """
    from tasks.core.training.card import model_card
    from tasks.core.training.fitting import fit
    from tasks.core.training.weights import publish_files

    job, model_dir = work.job, work.model_dir
    started_at = now()
    if team.leads:
        _announce(work, team)
    fitted = fit(job, model_dir / checkpoints.CHECKPOINTS, team, report, journal)
    if not team.leads:
        return None
    manifest = _manifest(work, fitted, started_at, team, journal)
    publish_files(
        fitted.publishable(job),
        fitted.tokenizer,
        model_dir,
        base_model_id=manifest.base_model_id,
        card=model_card(manifest),
        initial_adapter_dir=fitted.initial_adapter_dir,
        chat_template=job.data.template.source,
    )
    manifest = manifest.model_copy(update={"weights_sha256": weights_sha256(model_dir)})
    registry.write_manifest(model_dir, manifest)
    if journal is not None:
        journal.forget()
    logger.info(
        "%s is complete: last loss %s after %d steps",
        model_dir,
        _rounded(manifest.final_loss),
        manifest.steps,
    )
    return manifest


def _announce(work: TrainingWork, team: Team) -> None:
    job = work.job
    shared = f", shared by {team.size} processes ({team.strategy})" if team.size > 1 else ""
    logger.info("training %s on %s in %s%s", work.model_dir.name, job.device, job.precision.compute, shared)
    logger.info(
        "%s rows, %s tokens, %s of them learnt; updates: %s",
        *(f"{job.schedule.rows:,}", f"{job.data.train.rows.token_count:,}"),
        *(f"{job.schedule.learnt_tokens:,}", job.schedule.described),
    )
    if job.schedule.warning is not None:
        logger.warning("%s", job.schedule.warning)


def _manifest(
    work: TrainingWork, fitted: Fitted, started_at: str, team: Team, journal: Journal | None
) -> ModelManifest:
    job, model_dir = work.job, work.model_dir
    config, base, train_rows, validation = job.config, job.base, job.data.train, job.data.validation
    finished_at = now()
    return ModelManifest(
        run_name=model_dir.name,
        kind="full" if job.publishes_full_model else "adapter",
        base_model_id=_lasting_name(config.base_model_id),
        base_model_revision=base.revision,
        base_weights_sha256=base.weights_sha256,
        chat_template_sha256=job.data.chat_template_sha256,
        training_data_id=train_rows.data_id,
        training_rows_sha256=train_rows.sha256,
        training_dataset_sha256=train_rows.dataset_sha256,
        training_row_count=train_rows.dataset_count,
        skipped_row_count=train_rows.skipped_count,
        truncated_row_count=train_rows.truncated_count,
        earlier_answer_row_count=train_rows.earlier_count,
        unlearnt_answer_count=train_rows.unlearnt_count,
        thinking_row_count=train_rows.thinking_count,
        thoughts=job.data.template.thoughts,
        validation_data_id=None if validation is None else validation.data_id,
        settings={
            **config.model_dump(mode="json"),
            "compute_dtype": job.precision.compute,
            "rows_at_once": fitted.plan.rows_at_once,
            "pieces_in_step": fitted.plan.pieces,
        },
        losses=fitted.losses,
        final_loss=_last(point.loss for point in fitted.losses),
        final_validation_loss=_last(point.validation_loss for point in fitted.losses),
        best_step=None if fitted.best is None else fitted.best.step,
        best_validation_loss=None if fitted.best is None else fitted.best.loss,
        planned_steps=fitted.planned_steps,
        stopped_early=fitted.steps < fitted.planned_steps,
        steps=fitted.steps,
        trained_tokens=fitted.trained_tokens,
        seconds=round(fitted.seconds, 2),
        processes=team.size,
        strategy=team.strategy,
        memory_events=fitted.memory_events,
        restarts=() if journal is None else journal.restarts,
        started_at=started_at,
        finished_at=finished_at,
        ordered_at=registry.moment_after_all(model_dir.parent, finished_at),
        library_versions=library_versions(_LIBRARIES),
        device=job.device,
        tuneproof_version=library_version("tuneproof"),
    )


def _lasting_name(base_model_id: str) -> str:
    """A local base by its full path, so that the adapter finds it from any working directory."""
    path = Path(base_model_id).expanduser()
    return str(path.resolve()) if path.exists() else base_model_id


def _last(losses: Iterable[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return known[-1] if known else None


def _rounded(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f}"
