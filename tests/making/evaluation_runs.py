"""Run directories as `infer` leaves them, for tests of evaluation: predictions, manifest, training manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.core.config import EvaluatorConfig
from tasks.core.evaluation.evaluate import score_run
from tasks.core.evaluation.summary import Decision, EvaluationSummary, GateCheck, Verdict
from tasks.core.models.trained.registry import write_manifest
from tasks.core.records import (
    GenerationSettings,
    LossPoint,
    ModelIdentity,
    ModelManifest,
    Prediction,
    PredictionMetadata,
    RunIdentity,
    RunManifest,
)
from tasks.core.report.writing import report_run

BASE_WEIGHTS = "a" * 64


def row(number: int, answer: str, reference: str | None, **fields: str | None) -> Prediction:
    """One prediction; `error` and `finish_reason` may be given."""
    error = fields.get("error")
    return Prediction(
        id=f"{number:04d}-0",
        question=fields.get("question") or f"What is {number} + {number}?",
        system_prompt=fields.get("system_prompt"),
        predicted_answer=answer,
        ground_truth=reference,
        error=error,
        metadata=PredictionMetadata(
            token_count=len(answer.split()),
            finish_reason=fields.get("finish_reason") or ("error" if error else "stop"),
        ),
    )


def sums(count: int, right: int) -> list[Prediction]:
    """`count` additions of which the first `right` are answered correctly."""
    return [row(i, str(2 * i) if i < right else "I do not know", str(2 * i)) for i in range(count)]


def write_run(
    directory: Path,
    predictions: Iterable[Prediction],
    *,
    model_id: str = "package:base/model.gguf",
    adapter: str | None = None,
    weights: str = BASE_WEIGHTS,
    finished_at: str = "2026-01-01T00:05:00+00:00",
    rows_sha256: str = "d" * 64,
    temperature: float = 1.0,
    reference_tokens: int = 777,
    lines: list[dict[str, Any]] | None = None,
) -> Path:
    """Write predictions and manifest the way a finished run has them; `lines` are written in their place."""
    rows = list(predictions)
    directory.mkdir(parents=True)
    written = (
        [prediction.model_dump_json() for prediction in rows] if lines is None else map(json.dumps, lines)
    )
    content = "".join(f"{line}\n" for line in written).encode()
    (directory / "inferencer_output.jsonl").write_bytes(content)
    identity = RunIdentity(
        model=ModelIdentity(
            model_id=model_id,
            weights_sha256=weights,
            adapter_sha256=adapter,
            base_model_id="package:base/model.gguf" if adapter else None,
            dtype="float32",
            chat_template_sha256="c" * 64,
            vocab_size=512,
        ),
        rows_sha256=rows_sha256,
        row_count=len(rows),
        generation=GenerationSettings(max_new_tokens=64, temperature=temperature),
        max_sequence_length=512,
        long_prompts="truncate_left",
    )
    manifest = RunManifest(
        run_name=directory.name,
        run_key=identity.run_key,
        identity=identity,
        predictions_path="inferencer_output.jsonl",
        predictions_sha256=hashlib.sha256(content).hexdigest(),
        row_count=len(rows),
        error_count=sum(prediction.error is not None for prediction in rows),
        dataset_id="sums.jsonl",
        engine="inflight",
        started_at="2026-01-01T00:00:00+00:00",
        finished_at=finished_at,
        generation_seconds=20.0,
        completion_tokens=1000,
        prompt_tokens=4000,
        peak_memory_bytes=2_000_000_000,
        reference_perplexity=3.25,
        reference_tokens=reference_tokens,
        device="cpu",
        tuneproof_version="0.1.0",
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return directory


def evaluate_run(
    candidate: Path, baseline: Path | None, config: EvaluatorConfig, model: ModelManifest | None = None
) -> EvaluationSummary:
    """Score a run, compare it with a baseline if given, without a verdict, and write all files of an evaluation."""
    summary = score_run(candidate, baseline, config, model)
    report_run(candidate)
    return summary


def training(directory: Path) -> ModelManifest:
    """Manifest of a short training, written into `directory` as the model's."""
    losses = tuple(
        LossPoint(
            step=step, epoch=step / 10, loss=2.0 / step, validation_loss=2.1 / step if step % 5 == 0 else None
        )
        for step in range(1, 21)
    )
    manifest = ModelManifest(
        run_name=directory.name,
        kind="adapter",
        base_model_id="package:base/model.gguf",
        base_weights_sha256=BASE_WEIGHTS,
        chat_template_sha256="c" * 64,
        training_data_id="train.jsonl",
        training_rows_sha256="e" * 64,
        training_row_count=300,
        settings={},
        losses=losses,
        final_loss=0.1,
        steps=20,
        trained_tokens=9000,
        seconds=65.0,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:01:05+00:00",
        device="cpu",
        tuneproof_version="0.1.0",
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, manifest)
    return manifest


def decided(
    summary: EvaluationSummary, against_champion: EvaluationSummary, decision: Decision
) -> EvaluationSummary:
    """The summary with a champion, taken from an evaluation against it, and a verdict, as the gate writes it."""
    champion = against_champion.baseline
    assert champion is not None
    verdict = Verdict(
        decision=decision,
        primary_metric=summary.candidate.metrics[0].name,
        against="champion",
        against_run=champion.run_name,
        reasons=("The first reason <b>.", "The second reason."),
        checks=(
            GateCheck(name="minimum_rows", outcome="passed", detail="40 rows; at least 30 are asked for"),
            GateCheck(name="error_rate", outcome="failed", detail="0 of 40 rows have an error"),
            GateCheck(name="overlap", outcome="skipped", detail="the training rows are not here"),
        ),
        noise_floor=0.01,
    )
    return summary.model_copy(
        update={
            "champion": champion,
            "champion_comparison": against_champion.comparison,
            "verdict": verdict,
            "scores_sha256": against_champion.scores_sha256,  # it was the later one, and its scores are there
        }
    )
